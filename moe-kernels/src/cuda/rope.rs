//! Rotary position embedding.

use super::Cuda;
use super::fault::Fault;
use super::source::ROPE;
use super::vectors::{in_vectors, vector};
use crate::family::{Rope, RotaryHead, RotaryPairs, Rotation};
use crate::{Float, Result, View, ViewMut, check};

/// Heads in which a thread turns the same elements: `HEADS` of the kernels.
const HEADS: usize = 4;
/// Threads of a block: `THREADS` of the kernels.
const THREADS: usize = 128;

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
}
