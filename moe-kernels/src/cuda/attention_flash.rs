//! Attention of `bf16` on Hopper's tensor cores: `attention_flash.cu`, and the backward of `attention_flash_backward.cu`.

use super::Cuda;
use super::attention::Sizes;
use super::launch::Launch;
use super::source::{ATTENTION_FLASH, ATTENTION_FLASH_BACKWARD, Source};
use super::tensor_map::{TensorMap, Tiled};
use crate::family::AttentionShape;
use crate::{DType, Device, Float, Result, View, ViewMut};

/// Rows of a block's result, its threads, and keys of a step of the forward: `ROWS`, `THREADS` and `KEYS` of the kernels.
const ROWS: usize = 128;
const THREADS: usize = 384;
const KEYS: usize = 128;
/// Queries of a step of the backward, and rows of a copy: `STEP` and `PANEL`.
const STEP: usize = 64;
/// Bytes of `Bounds`, of `Statistics`, and of a barrier.
const BOUNDS: usize = 16;
const STATISTICS: usize = 4 * 4 * STEP + BOUNDS;
const BARRIER: usize = 8;

/// Sizes of heads, of queries and keys and of values, that there are kernels for.
const HEADS: [(usize, usize); 3] = [(64, 64), (128, 128), (192, 128)];

/// What the kernels are compiled for.
pub(super) const WAYS: &[&[(&str, i64)]] = &[
    &[("HEAD_DIM", 64), ("V_HEAD_DIM", 64)],
    &[("HEAD_DIM", 128), ("V_HEAD_DIM", 128)],
    &[("HEAD_DIM", 192), ("V_HEAD_DIM", 128)],
];

/// The gradients of a backward.
pub(super) struct Backward<'a, T> {
    pub(super) dq: ViewMut<'a, T, Cuda>,
    pub(super) dk: ViewMut<'a, T, Cuda>,
    pub(super) dv: ViewMut<'a, T, Cuda>,
}

/// A call that these kernels take.
pub(super) struct Flash<'a> {
    device: &'a Cuda,
    dim: usize,
    v_dim: usize,
    scale: f32,
}

impl<'a> Flash<'a> {
    /// `None` unless these kernels take operands like these.
    pub(super) fn of<T: Float>(
        device: &'a Cuda,
        s: &AttentionShape,
        matrices: &[View<'_, T, Cuda>],
    ) -> Option<Self> {
        let (dim, v_dim, scale) = (s.head_dim, s.v_head_dim, s.scale as f32);
        let fits = T::DTYPE == DType::Bf16
            && HEADS.contains(&(dim, v_dim))
            && device.compute_capability() == (9, 0)
            && (f32::MIN_POSITIVE..1e30).contains(&scale)
            && s.heads > 0
            && matrices.iter().all(|&m| Tiled::from(m).is_addressable());
        fits.then_some(Flash { device, dim, v_dim, scale })
    }

    #[allow(clippy::too_many_arguments)] // the operands of the formula
    pub(super) fn forward<T: Float>(
        &self,
        o: &mut ViewMut<'_, T, Cuda>,
        lse: &mut ViewMut<'_, T::Acc, Cuda>,
        q: View<'_, T, Cuda>,
        k: View<'_, T, Cuda>,
        v: View<'_, T, Cuda>,
        first_keys: Option<View<'_, i32, Cuda>>,
        s: &Sizes,
    ) -> Result<()> {
        let Flash { dim, v_dim, .. } = *self;
        let shared = 2 * (ROWS * dim + 2 * KEYS * (dim + v_dim)) + 9 * BARRIER;
        let launch = self.launch(&ATTENTION_FLASH, "flash_forward", s.q_len, s.heads, s, shared)?;
        let launch = launch.mat_mut(o).mat_mut(lse).map(q, heads(q, s, s.heads)?);
        let launch = launch.map(k, heads(k, s, s.kv_heads)?).map(v, heads(v, s, s.kv_heads)?);
        // SAFETY: the shapes fit together; the copy engine reads, and the kernel writes, inside the matrices.
        unsafe { self.sizes(launch.vector_or_null(first_keys), s).launch() }
    }

    #[allow(clippy::too_many_arguments)] // the operands of the formula
    pub(super) fn backward<T: Float>(
        &self,
        mut gradients: Backward<'_, T>,
        d_o: View<'_, T, Cuda>,
        q: View<'_, T, Cuda>,
        k: View<'_, T, Cuda>,
        v: View<'_, T, Cuda>,
        o: View<'_, T, Cuda>,
        lse: View<'_, T::Acc, Cuda>,
        first_keys: Option<View<'_, i32, Cuda>>,
        s: &Sizes,
    ) -> Result<()> {
        let Flash { dim, v_dim, .. } = *self;
        let blocks = (s.q_len as usize).div_ceil(STEP) * s.batch as usize;
        let statistics = self.device.alloc(blocks * s.heads as usize * STATISTICS)?;
        let bounds = self.device.alloc(blocks * BOUNDS)?;
        let maps = [
            (d_o, heads(d_o, s, s.heads)?),
            (q, heads(q, s, s.heads)?),
            (k, heads(k, s, s.kv_heads)?),
            (v, heads(v, s, s.kv_heads)?),
        ];

        let source = &ATTENTION_FLASH_BACKWARD;
        let parts = blocks * s.heads as usize;

        let launch = self.kernel(source, "flash_statistics")?.grid([parts, 1, 1]).block([4 * STEP, 1, 1]);
        let launch = launch.scratch(&statistics).scratch(&bounds).mat(d_o).mat(o).mat(lse);
        // SAFETY: there is room for every block of queries of every head, and for the bounds of every block.
        unsafe { self.sizes(launch.vector_or_null(first_keys), s).launch()? };

        // dq is summed in `f32`, keys after keys; counters, one for each block of queries after one for the tiles, keep the order.
        let sums = self.device.alloc(parts * STEP * dim * size_of::<f32>())?;
        let turns = self.device.alloc_zeroed((1 + parts) * size_of::<i32>())?;
        // With wide heads a block has one buffer of dS and of parts of dq; with others, two.
        let buffers = if dim + v_dim <= 256 { 2 } else { 1 };
        let shared = 2 * (ROWS + 2 * STEP) * (dim + v_dim)
            + buffers * (2 * ROWS * STEP + 4 * STEP * dim)
            + 2 * STATISTICS
            + (10 + buffers) * BARRIER
            + 4 * size_of::<i32>();
        let launch = self.launch(source, "flash_backward", s.kv_len, s.kv_heads, s, shared)?;
        let launch = launch.mat_mut(&mut gradients.dk).mat_mut(&mut gradients.dv);
        let launch = launch.scratch(&sums).scratch(&turns);
        let launch = maps.iter().fold(launch, |launch, &(matrix, map)| launch.map(matrix, map));
        // SAFETY: the shapes fit together; the copy engine reads, and the kernel writes, inside the matrices and the scratch.
        unsafe { self.sizes(launch.scratch(&statistics).scratch(&bounds), s).launch()? };

        let launch = self.kernel(source, "flash_backward_q")?.grid([parts, 1, 1]).block([4 * STEP, 1, 1]);
        let launch = launch.mat_mut(&mut gradients.dq).scratch(&sums).scratch(&bounds);
        // SAFETY: it reads the sums of all blocks that see a key, and writes inside the matrix.
        unsafe { self.sizes(launch, s).launch() }
    }

    /// A block for every `ROWS` rows of every head of every sequence.
    fn launch(
        &self,
        source: &'static Source,
        name: &'static str,
        len: i32,
        heads: i32,
        s: &Sizes,
        shared: usize,
    ) -> Result<Launch<'a>> {
        let blocks = (len as usize).div_ceil(ROWS) * heads as usize * s.batch as usize;
        let launch = self.kernel(source, name)?;
        Ok(launch.grid([blocks, 1, 1]).block([THREADS, 1, 1]).shared(shared))
    }

    fn kernel(&self, source: &'static Source, name: &'static str) -> Result<Launch<'a>> {
        let variant = source.of(DType::Bf16).with("HEAD_DIM", self.dim as i64);
        self.device.kernel(&variant.with("V_HEAD_DIM", self.v_dim as i64), name)
    }

    /// What all kernels end with: `SIZES`.
    fn sizes(&self, launch: Launch<'a>, s: &Sizes) -> Launch<'a> {
        let launch = launch.value(s.batch).value(s.q_len).value(s.kv_len).value(s.heads).value(s.kv_heads);
        launch.value(s.first_query).value(s.window).value(self.scale)
    }
}

/// A matrix `[len · batch, heads · dim]` as the copy engine sees it.
fn heads<T: Float>(m: View<'_, T, Cuda>, s: &Sizes, heads: i32) -> Result<TensorMap> {
    Tiled::from(m).heads(s.batch as usize, heads as usize, STEP as u32)
}
