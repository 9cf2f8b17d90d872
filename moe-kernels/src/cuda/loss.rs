//! Vocabulary-parallel cross-entropy.

use super::Cuda;
use super::source::LOSS;
use super::vectors::{in_vectors, vector};
use crate::family::Loss;
use crate::{Float, Result, View, ViewMut, check};

/// Vectors that a thread of forward loads at once, and its threads at most.
const FORWARD_VECTORS: usize = 4;
const FORWARD_THREADS: usize = 256;
/// Vectors of a thread of backward (`U` of the kernel), and its threads.
const BACKWARD_VECTORS: usize = 2;
const BACKWARD_THREADS: usize = 256;
/// Threads of a block that merges.
const MERGE_THREADS: usize = 256;
/// Threads of a block that holds a part of a row.
const WHOLE_THREADS: usize = 512;

/// Blocks that hold a row together may be so many.
pub(super) const WAYS: &[&[(&str, i64)]] =
    &[&[], &[("CLUSTER", 1)], &[("CLUSTER", 2)], &[("CLUSTER", 4)], &[("CLUSTER", 8)]];

/// Bytes of a row that a block should hold, so that a multiprocessor has several blocks of which some load and some compute; and
/// those that it holds at most.
const PART: usize = 80 << 10;
const LARGEST_PART: usize = 220 << 10;

/// How many blocks, each with as much as `shared` bytes, hold a row of so many bytes, where they can.
fn cluster(row: usize, shared: usize) -> Option<usize> {
    let blocks = row.div_ceil(PART).next_power_of_two().min(8);
    (row.div_ceil(blocks) <= LARGEST_PART.min(shared)).then_some(blocks)
}

impl<T: Float> Loss<T> for Cuda {
    fn cross_entropy(
        &self,
        mut lse: ViewMut<'_, T::Acc, Self>,
        mut target: ViewMut<'_, T::Acc, Self>,
        logits: View<'_, T, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy";
        let [n, cols] = check::cross_entropy(KERNEL, &lse, &target, logits, labels)?;
        let (name, elements) = match in_vectors(logits) {
            true => ("cross_entropy", vector::<T>()),
            false => ("cross_entropy_any", 1),
        };
        let threads =
            cols.div_ceil(elements * FORWARD_VECTORS).next_multiple_of(32).clamp(32, FORWARD_THREADS);
        let launch = self.kernel(&LOSS.of(T::DTYPE), name)?.grid([n, 1, 1]).block([threads, 1, 1]);
        let launch = launch.vector_mut(&mut lse).vector_mut(&mut target).mat(logits).vector(labels);
        // SAFETY: the kernel reads `n` rows of `cols` logits and `n` labels, and writes `n` results of each kind.
        unsafe { launch.size(first).size(cols).launch() }
    }

    fn merge_lse(&self, mut lse: ViewMut<'_, T::Acc, Self>, parts: View<'_, T::Acc, Self>) -> Result<()> {
        let [count, n] = parts.shape();
        check::shape("merge_lse", "lse", [1, n], lse.shape())?;
        let launch = self.kernel(&LOSS.of(T::DTYPE), "merge_lse")?;
        let launch = launch.grid([n.div_ceil(MERGE_THREADS), 1, 1]).block([MERGE_THREADS, 1, 1]);
        // SAFETY: the kernel reads `count` rows of `n` elements, and writes one.
        unsafe { launch.vector_mut(&mut lse).mat(parts).size(count).size(n).launch() }
    }

    fn cross_entropy_backward(
        &self,
        mut logits: ViewMut<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
        scale: View<'_, T::Acc, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy_backward";
        let [n, cols] = check::cross_entropy_backward(KERNEL, &logits, lse, labels, scale)?;
        let (name, elements) = match in_vectors(logits.as_view()) {
            true => ("cross_entropy_backward", vector::<T>()),
            false => ("cross_entropy_backward_any", 1),
        };
        let pieces = cols.div_ceil(elements * BACKWARD_VECTORS * BACKWARD_THREADS);
        let launch =
            self.kernel(&LOSS.of(T::DTYPE), name)?.grid([n * pieces, 1, 1]).block([BACKWARD_THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut logits).vector(lse).vector(labels).size(first);
        // SAFETY: the kernel touches `n` rows of `cols` elements, and `n` elements of each vector.
        unsafe { launch.vector(scale).size(cols).size(pieces).launch() }
    }

    fn cross_entropy_whole(
        &self,
        mut lse: ViewMut<'_, T::Acc, Self>,
        mut target: ViewMut<'_, T::Acc, Self>,
        mut logits: ViewMut<'_, T, Self>,
        labels: View<'_, i32, Self>,
        scale: View<'_, T::Acc, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy_whole";
        let [n, cols] = check::cross_entropy(KERNEL, &lse, &target, logits.as_view(), labels)?;
        check::shape(KERNEL, "scale", [1, n], scale.shape())?;
        let held = cluster(cols * size_of::<T>(), self.most_shared())
            .filter(|_| in_vectors(logits.as_view()) && self.compute_capability() >= (9, 0));
        let Some(blocks) = held else {
            self.cross_entropy(lse.reborrow(), target, logits.as_view(), labels, 0)?;
            return self.cross_entropy_backward(logits, lse.as_view(), labels, 0, scale);
        };
        let part = cols.div_ceil(blocks).next_multiple_of(vector::<T>());
        let launch = self.kernel(&LOSS.of(T::DTYPE).with("CLUSTER", blocks as i64), KERNEL)?;
        let launch =
            launch.grid([n * blocks, 1, 1]).block([WHOLE_THREADS, 1, 1]).shared(part * size_of::<T>());
        let launch = launch.vector_mut(&mut lse).vector_mut(&mut target).mat_mut(&mut logits).vector(labels);
        // SAFETY: the kernel touches `n` rows of `cols` elements, of which each block keeps at most `part`, and `n` elements of each
        // vector.
        unsafe { launch.vector(scale).size(cols).size(part).launch() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_held_where_its_parts_have_room() {
        // What a block has on compute capability 9.0, and on 12.0.
        let (hopper, small) = (224 << 10, 96 << 10);
        for (row, blocks) in [(1, 1), (PART, 1), (PART + 1, 2), (3 * PART, 4), (8 * PART, 8)] {
            assert_eq!([cluster(row, hopper), cluster(row, small)], [Some(blocks); 2], "{row} bytes");
        }
        assert_eq!([cluster(8 * small, hopper), cluster(8 * small, small)], [Some(8); 2]);
        assert_eq!([cluster(8 * small + 1, hopper), cluster(8 * small + 1, small)], [Some(8), None]);
        assert_eq!(
            [cluster(8 * LARGEST_PART, hopper), cluster(8 * LARGEST_PART + 1, hopper)],
            [Some(8), None]
        );
    }
}
