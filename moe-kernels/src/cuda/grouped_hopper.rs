//! Products of row groups in bf16 on Hopper: when its kernel can take them, and how it is launched.

use super::Cuda;
use super::launch::Launch;
use super::source::GROUPED_HOPPER;
use super::source::Variant;
use super::tensor_map::{ROW, TensorMap, Tiled};
use crate::family::GateFunction;
use crate::{DType, Result, View};

/// Which of the products: `OP` of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}

/// How the kernel is built for a product.
pub(super) struct Build {
    product: Product,
    /// The gated activation that follows it, if one does: its own of the forward product, its backward of the input gradient.
    gate: Option<GateFunction>,
    /// Columns of a tile.
    columns: usize,
    /// Blocks of k on their way through shared memory.
    stages: usize,
    /// Sets of slices of the result on their way out, for each warpgroup.
    buffers: usize,
    /// Whether warpgroups take turns with tiles, else they share each.
    pingpong: bool,
}

/// Turns hide the way out of results, which sums of a few thousand products need.
const fn in_turns(product: Product) -> Build {
    Build { product, gate: None, columns: 192, stages: 4, buffers: 4, pingpong: true }
}

/// The larger tile loads less for each product.
const fn together(product: Product) -> Build {
    Build { product, gate: None, columns: 256, stages: 4, buffers: 2, pingpong: false }
}

/// With the activation, whose slices are more.
const fn gated_in_turns(product: Product, function: GateFunction) -> Build {
    Build { gate: Some(function), buffers: 2, ..in_turns(product) }
}

/// Rows of a tile, bytes of a row of a stage: `BM` and `BK` of the kernel.
pub(super) const TILE_ROWS: usize = 128;
const STAGE_ROW: usize = 128;
/// Rows of a slice of the result.
const SLICE_ROWS: usize = 64;
/// Blocks that share what they load.
const CLUSTER: usize = 2;
/// Groups whose row tiles' ends have room in shared memory.
const MOST_GROUPS: usize = 512;
/// The kernel counts tiles in 32 bits.
const MOST_TILES: usize = 1 << 30;

type Definitions = [(&'static str, i64); 7];

impl Build {
    const fn definitions(&self) -> Definitions {
        [
            ("OP", self.product as i64),
            ("GLU", self.glu()),
            ("BN", self.columns as i64),
            ("STAGES", self.stages as i64),
            ("BUFFERS", self.buffers as i64),
            ("CLUSTER", CLUSTER as i64),
            ("PINGPONG", self.pingpong as i64),
        ]
    }

    const fn glu(&self) -> i64 {
        match self.gate {
            None => 0,
            Some(GateFunction::Silu) => 1,
            Some(GateFunction::GeluTanh) => 2,
        }
    }

    /// Slices of a set, and bytes of a row of one: `SET` and `SLICE_ROW` of the kernel.
    const fn set(&self) -> (usize, u32) {
        match (self.gate, self.product) {
            (None, _) => (1, ROW),
            (Some(_), Product::Forward) => (3, ROW / 2),
            (Some(_), _) => (2, ROW),
        }
    }

    /// Shared memory in bytes: stages with two barriers each, sets of slices with one each, and a count for each group.
    fn shared(&self, groups: usize) -> usize {
        let (slices, row) = self.set();
        let stage = (TILE_ROWS + self.columns) * STAGE_ROW + 16;
        self.stages * stage + 2 * self.buffers * (slices * SLICE_ROWS * row as usize + 8) + 4 * groups
    }

    /// The kernel's variant.
    pub(super) fn variant(&self) -> Variant {
        let definitions = self.definitions().into_iter();
        definitions.fold(GROUPED_HOPPER.of(DType::Bf16), |v, (name, value)| v.with(name, value))
    }

    /// Tiles beside each other in `n` columns of an input gradient.
    pub(super) fn column_tiles(&self, n: usize) -> usize {
        n.div_ceil(self.columns)
    }

    /// A slice of a result whose groups' ends only the device knows.
    pub(super) fn slices(&self, matrix: Tiled) -> Result<TensorMap> {
        matrix.ragged([self.set().1, SLICE_ROWS as u32])
    }

    /// A launch on all of the device, with no argument yet.
    pub(super) fn begin<'a>(&self, device: &'a Cuda, groups: usize) -> Result<Launch<'a>> {
        // Binds the device before the driver encodes maps.
        let launch = device.kernel(&self.variant(), "grouped_hopper")?;
        let blocks = device.multiprocessors() / CLUSTER * CLUSTER;
        Ok(launch.grid([blocks, 1, 1]).block([384, 1, 1]).shared(self.shared(groups)))
    }

    /// Rows of what one load takes of `b`: `PIECE_ROWS` of the kernel.
    pub(super) const fn piece_rows(&self) -> u32 {
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
    &gated_in_turns(Product::Forward, GateFunction::Silu).definitions(),
    &gated_in_turns(Product::Forward, GateFunction::GeluTanh).definitions(),
    &gated_in_turns(Product::InputGradient, GateFunction::Silu).definitions(),
    &gated_in_turns(Product::InputGradient, GateFunction::GeluTanh).definitions(),
];

/// Whether the kernel can take operands of so many groups: bf16 on compute capability 9.0; all rows begin at multiples of 16 bytes, and
/// those of results are whole 16 bytes (the copy engine writes no less); at most [`MOST_GROUPS`] groups and [`MOST_TILES`] tiles; nothing
/// is empty.
pub(super) fn fit(device: &Cuda, operands: &[Tiled], results: &[Tiled], groups: usize) -> bool {
    let tiles = |y: &Tiled| (y.rows() / TILE_ROWS + groups) * (y.cols() / 64 + 1);
    device.compute_capability() == (9, 0)
        && operands.iter().all(|x| x.dtype() == DType::Bf16)
        && (1..=MOST_GROUPS).contains(&groups)
        && operands.iter().chain(results).all(Tiled::is_addressable)
        && results.iter().all(|y| (y.cols() * y.dtype().size()).is_multiple_of(16) && tiles(y) < MOST_TILES)
}

/// How the first product is built with the activation `function`: in turns always, which hide what it writes.
pub(super) fn gated_forward(function: GateFunction) -> Build {
    gated_in_turns(Product::Forward, function)
}

/// How the input gradient of the last product, `n` columns of sums of `k` products, is built with the activation's backward, if that is
/// faster than one after the other (`benchmarks/grouped_glu.py`): not where sums are long, which leaves the multiprocessors no time for
/// more at the power they have, nor where much of the last of few tiles is empty.
pub(super) fn gated_backward(function: GateFunction, n: usize, k: usize) -> Option<Build> {
    let turns = gated_in_turns(Product::InputGradient, function);
    (k <= 4096 && (n >= 8192 || n.is_multiple_of(turns.columns))).then_some(turns)
}

/// Operands of a product: `y = a · b` of each group, as the kernel names them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) product: Product,
    pub(super) y: Tiled,
    pub(super) a: Tiled,
    pub(super) b: Tiled,
    pub(super) groups: usize,
    /// Whether a weight gradient is added to what `y` holds; it is written otherwise, as the other products are.
    pub(super) add: bool,
}

impl Tiles {
    /// Whether the kernel can take them.
    pub(super) fn fit(&self, device: &Cuda) -> bool {
        fit(device, &[self.a, self.b], &[self.y], self.groups)
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
        let Tiles { product, y, a, b, groups, add } = *self;
        let build = self.build();
        let launch = build.begin(device, groups)?;
        let (chunk, piece) = ([ROW, SLICE_ROWS as u32], build.piece_rows());
        // One group's product is [m, k] · [k, n]; of m and k the device knows one.
        let (maps, m, k) = match product {
            Product::WeightGradient => {
                ([a.ragged(chunk)?, b.ragged([ROW, piece])?, y.groups(groups, chunk[1])?], a.cols(), 0)
            }
            _ => ([a.plain(TILE_ROWS as u32)?, b.groups(groups, piece)?, build.slices(y)?], 0, a.cols()),
        };
        let launch = maps.into_iter().fold(launch, Launch::value);
        let launch = match product {
            Product::WeightGradient => launch.size(usize::from(add)),
            _ => launch,
        };
        Ok(launch.vector(offsets).size(groups).size(a.rows()).size(m).size(y.cols()).size(k))
    }
}
