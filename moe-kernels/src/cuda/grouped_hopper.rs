//! Products of row groups in bf16 on Hopper: when its kernel can take them, and how it is launched.

use super::Cuda;
use super::launch::Launch;
use super::source::GROUPED_HOPPER;
use super::tensor_map::Tiled;
use crate::{DType, Result, View};

/// Which of the products: `OP` of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}

/// How the kernel is built for a product.
struct Build {
    product: Product,
    /// Columns of a tile.
    columns: usize,
    /// Blocks of k on their way through shared memory.
    stages: usize,
    /// Slices of the result on their way out, for each warpgroup.
    buffers: usize,
    /// Whether warpgroups take turns with tiles, else they share each.
    pingpong: bool,
}

/// Turns hide the way out of results, which sums of a few thousand products need.
const fn in_turns(product: Product) -> Build {
    Build { product, columns: 192, stages: 4, buffers: 4, pingpong: true }
}

/// The larger tile loads less for each product.
const fn together(product: Product) -> Build {
    Build { product, columns: 256, stages: 4, buffers: 2, pingpong: false }
}

/// Rows of a tile, bytes of a row of a stage: `BM` and `BK` of the kernel.
const TILE_ROWS: usize = 128;
const STAGE_ROW: usize = 128;
/// Rows of a slice of the result.
const SLICE_ROWS: usize = 64;
/// Blocks that share what they load.
const CLUSTER: usize = 2;
/// Groups whose row tiles' ends have room in shared memory.
const MOST_GROUPS: usize = 512;
/// The kernel counts tiles in 32 bits.
const MOST_TILES: usize = 1 << 30;

type Definitions = [(&'static str, i64); 6];

impl Build {
    const fn definitions(&self) -> Definitions {
        [
            ("OP", self.product as i64),
            ("BN", self.columns as i64),
            ("STAGES", self.stages as i64),
            ("BUFFERS", self.buffers as i64),
            ("CLUSTER", CLUSTER as i64),
            ("PINGPONG", self.pingpong as i64),
        ]
    }

    /// Shared memory in bytes: stages, slices, two barriers a stage, and a count for each group.
    fn shared(&self, groups: usize) -> usize {
        let stage = (TILE_ROWS + self.columns) * STAGE_ROW + 16;
        self.stages * stage + 2 * self.buffers * SLICE_ROWS * STAGE_ROW + 4 * groups
    }

    /// Rows of what one load takes of `b`: `PIECE_ROWS` of the kernel.
    const fn piece_rows(&self) -> u32 {
        let rows = match self.product {
            Product::Forward => self.columns / CLUSTER,
            Product::InputGradient | Product::WeightGradient => 64,
        };
        rows as u32
    }
}

/// All definitions that the kernel is compiled with.
pub(super) const WAYS: &[&[(&str, i64)]] = &[
    &in_turns(Product::Forward).definitions(),
    &together(Product::Forward).definitions(),
    &together(Product::InputGradient).definitions(),
    &in_turns(Product::WeightGradient).definitions(),
    &together(Product::WeightGradient).definitions(),
];

/// Operands of a product: `y = a · b` of each group, as the kernel names them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) product: Product,
    pub(super) y: Tiled,
    pub(super) a: Tiled,
    pub(super) b: Tiled,
    pub(super) groups: usize,
}

impl Tiles {
    /// Whether the kernel can take them: bf16 on compute capability 9.0; all rows begin at multiples of 16 bytes, and those
    /// of `y` are whole 16 bytes (the copy engine writes no less); at most [`MOST_GROUPS`] groups and [`MOST_TILES`] tiles;
    /// nothing is empty.
    pub(super) fn fit(&self, device: &Cuda) -> bool {
        let tiles = (self.y.rows() / TILE_ROWS + self.groups) * (self.y.cols() / self.build().columns + 1);
        device.compute_capability() == (9, 0)
            && self.a.dtype() == DType::Bf16
            && (self.y.cols() * self.y.dtype().size()).is_multiple_of(16)
            && (1..=MOST_GROUPS).contains(&self.groups)
            && [self.y, self.a, self.b].iter().all(Tiled::is_addressable)
            && tiles < MOST_TILES
    }

    /// What measured fastest (`benchmarks/grouped_gemm.py`): in turns, unless the sum is long, or the last of few tiles would have a
    /// third of its columns at most, or it is the input gradient.
    fn build(&self) -> Build {
        let (n, turns) = (self.y.cols(), in_turns(self.product));
        let poor_rest = n < 8192 && (1..=turns.columns / 3).contains(&(n % turns.columns));
        match self.product {
            Product::Forward if self.a.cols() < 8192 && !poor_rest => turns,
            Product::WeightGradient if !poor_rest => turns,
            product => together(product),
        }
    }

    /// The kernel with all its arguments but the fault.
    pub(super) fn launch<'a>(&self, device: &'a Cuda, offsets: View<'_, i32, Cuda>) -> Result<Launch<'a>> {
        let Tiles { product, y, a, b, groups } = *self;
        let build = self.build();
        let definitions = build.definitions().into_iter();
        let variant =
            definitions.fold(GROUPED_HOPPER.of(DType::Bf16), |v, (name, value)| v.with(name, value));
        // Binds the device before the driver encodes maps.
        let launch = device.kernel(&variant, "grouped_hopper")?;
        let (slice, piece) = (SLICE_ROWS as u32, build.piece_rows());
        // One group's product is [m, k] · [k, n]; of m and k the device knows one.
        let (maps, m, k) = match product {
            Product::WeightGradient => {
                ([a.ragged(slice)?, b.ragged(piece)?, y.groups(groups, slice)?], a.cols(), 0)
            }
            _ => ([a.plain(TILE_ROWS as u32)?, b.groups(groups, piece)?, y.ragged(slice)?], 0, a.cols()),
        };
        let blocks = device.multiprocessors() / CLUSTER * CLUSTER;
        let launch = launch.grid([blocks, 1, 1]).block([384, 1, 1]).shared(build.shared(groups));
        let launch = maps.into_iter().fold(launch, Launch::value).vector(offsets);
        Ok(launch.size(groups).size(a.rows()).size(m).size(y.cols()).size(k))
    }
}
