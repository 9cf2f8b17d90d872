//! Rotary position embedding.

use super::Cuda;
use super::fault::Fault;
use super::lanes::Lanes;
use super::norm::add_pieces;
use super::pieces::Pieces;
use super::source::ROPE;
use super::vectors::{in_vectors, vector};
use crate::family::norm_rope::{norm_then_rope, norm_then_rope_backward};
use crate::family::{Rope, RotaryHead, RotaryPairs, Rotation};
use crate::{Device, Float, Result, View, ViewMut, check};

/// Heads in which a thread turns the same elements: `HEADS` of the kernels.
const HEADS: usize = 4;
/// Threads of a block: `THREADS` of the kernels.
const THREADS: usize = 128;
/// Of `norm_rope_backward`: heads of a thread, and bytes of shared memory: two vectors of either half of both operands in these.
const HEADS_BACK: usize = 2;
const SHARED_BACK: usize = 2 * HEADS_BACK * 2 * 2 * 16 * THREADS;
/// Blocks of `norm_rope_backward` that a multiprocessor runs at once.
const BLOCKS_BACK: usize = 3;

/// How heads lie over threads: `Heads` of the kernels.
struct HeadLanes {
    lanes: usize,
    groups: usize,
    heads: usize,
    head_dim: usize,
}

impl HeadLanes {
    /// Whole heads of halves, vectors throughout, in `of_thread` heads for each thread.
    fn of<T: Float>(head: RotaryHead, width: usize, angles: usize, of_thread: usize) -> Option<Self> {
        let RotaryHead { head_dim, first, pairs } = head;
        let lanes = angles / vector::<T>();
        let whole = first == 0 && head_dim == 2 * angles && angles.is_multiple_of(vector::<T>());
        let fits = whole && pairs == RotaryPairs::Halves && lanes.is_power_of_two() && lanes <= 32;
        let heads = width / head_dim;
        (fits && heads > 0).then(|| HeadLanes { lanes, groups: heads.div_ceil(of_thread), heads, head_dim })
    }

    /// Tokens of a block, and threads of each.
    fn block(&self) -> Lanes {
        let lanes = (self.lanes * self.groups).next_power_of_two().min(THREADS);
        Lanes { lanes, rows: THREADS / lanes }
    }

    fn argument(&self) -> [i32; 4] {
        [self.lanes, self.groups, self.heads, self.head_dim].map(|n| n as i32)
    }
}

impl<T: Float> Rope<T> for Cuda {
    fn rope(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
        rotation: Rotation,
    ) -> Result<()> {
        const KERNEL: &str = "rope";
        let [n, width] = x.shape();
        let [table, angles] = cos.shape();
        check::rope(KERNEL, &y, x, cos, sin, positions, head)?;
        let RotaryHead { head_dim, first, pairs } = head;
        let size = vector::<T>();
        let whole = |elements: usize| elements.is_multiple_of(size);
        let tables = in_vectors(cos) && in_vectors(sin);
        let fits = tables && in_vectors(x) && in_vectors(y.as_view()) && whole(head_dim) && whole(first);
        let (name, rotated, elements) = match pairs {
            RotaryPairs::Halves if fits && whole(angles) => ("rope_halves", angles / size, size),
            RotaryPairs::Halves => ("rope_halves_any", angles, 1),
            RotaryPairs::Adjacent if fits && whole(2 * angles) => ("rope_adjacent", 2 * angles / size, size),
            RotaryPairs::Adjacent => ("rope_adjacent_any", angles, 1),
        };
        let heads = width / head_dim;
        let items = (rotated + (head_dim - 2 * angles) / elements) * heads.div_ceil(HEADS);
        let lanes = items.next_power_of_two().min(THREADS);
        let rows = THREADS / lanes;
        let launch =
            self.kernel(&ROPE.of(T::DTYPE), name)?.grid([n.div_ceil(rows), 1, 1]).block([lanes, rows, 1]);
        let launch = launch.mat_mut(&mut y).mat(x).mat(cos).mat(sin).vector(positions).size(n).size(table);
        let launch = launch.size(head_dim).size(first).size(angles).size(heads);
        let sign = match rotation {
            Rotation::Forward => 1.0,
            Rotation::Backward => -1.0,
        };
        let fault = Fault::Index { what: "position", end: table };
        // SAFETY: the kernel touches `n` rows of `heads` times `head_dim` elements, and rows of the tables below `table`; vectors
        // are whole and aligned where the kernel moves them.
        unsafe { launch.acc::<T>(sign).fault(fault).launch() }
    }

    fn rms_norm_rope(
        &self,
        mut y: ViewMut<'_, T, Self>,
        mut rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
        eps: f64,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_rope";
        let ([n, width], [table, angles]) = (x.shape(), cos.shape());
        check::rms_norm_rope(KERNEL, &y, &rstd, x, w, cos, sin, positions, head)?;
        let vectors = [y.as_view(), x, w].into_iter().all(in_vectors) && in_vectors(cos) && in_vectors(sin);
        let Some(heads) = HeadLanes::of::<T>(head, width, angles, HEADS).filter(|_| vectors) else {
            return norm_then_rope(self, y, rstd, x, w, cos, sin, positions, head, eps);
        };
        let lanes = heads.block();
        let launch = self.kernel(&ROPE.of(T::DTYPE), "norm_rope")?.grid(lanes.grid(n)).block(lanes.block());
        let launch = launch.mat_mut(&mut y).vector_mut(&mut rstd).mat(x).vector(w).mat(cos).mat(sin);
        let launch = launch.vector(positions).size(n).size(table).value(heads.argument()).acc::<T>(eps);
        // SAFETY: the kernel touches `n` rows of `heads` times `head_dim` elements and as many sums, and rows of the tables below
        // `table`; all are whole vectors.
        unsafe { launch.fault(Fault::Index { what: "position", end: table }).launch() }
    }

    fn rms_norm_rope_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        cos: View<'_, T::Acc, Self>,
        sin: View<'_, T::Acc, Self>,
        positions: View<'_, i32, Self>,
        head: RotaryHead,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_rope_backward";
        let ([n, width], [table, angles]) = (x.shape(), cos.shape());
        check::rms_norm_rope_backward(KERNEL, &dx, &dw, dy, x, w, rstd, cos, sin, positions, head)?;
        if n == 0 || width == 0 {
            return Ok(());
        }
        let vectors =
            [dx.as_view(), dy, x, w].into_iter().all(in_vectors) && in_vectors(cos) && in_vectors(sin);
        let Some(heads) = HeadLanes::of::<T>(head, width, angles, HEADS_BACK).filter(|_| vectors) else {
            return norm_then_rope_backward(self, dx, dw, dy, x, w, rstd, cos, sin, positions, head);
        };
        let lanes = heads.block();
        let pieces = Pieces::of(n, BLOCKS_BACK, lanes.rows);
        let count = pieces.count(n);
        let partial = self.alloc(count * head.head_dim * size_of::<T::Acc>())?;
        let launch = self.kernel(&ROPE.of(T::DTYPE), "norm_rope_backward")?.grid([count, 1, 1]);
        let launch = launch.block(lanes.block()).shared(SHARED_BACK).mat_mut(&mut dx).scratch(&partial);
        let launch = launch.mat(dy).mat(x).vector(w).vector(rstd).mat(cos).mat(sin).vector(positions);
        let launch = launch.size(n).size(table).value(heads.argument()).value(pieces.argument());
        // SAFETY: as above; the kernel also writes a row of `partial` for each block.
        unsafe { launch.fault(Fault::Index { what: "position", end: table }).launch()? };
        add_pieces::<T>(self, dw, &partial, count)
    }
}
