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
        mut dlogits: ViewMut<'_, T, Self>,
        logits: View<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
        scale: View<'_, T::Acc, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy_backward";
        let [n, cols] = check::cross_entropy_backward(KERNEL, &dlogits, logits, lse, labels, scale)?;
        let (name, elements) = match in_vectors(logits) && in_vectors(dlogits.as_view()) {
            true => ("cross_entropy_backward", vector::<T>()),
            false => ("cross_entropy_backward_any", 1),
        };
        let pieces = cols.div_ceil(elements * BACKWARD_VECTORS * BACKWARD_THREADS);
        let launch =
            self.kernel(&LOSS.of(T::DTYPE), name)?.grid([n * pieces, 1, 1]).block([BACKWARD_THREADS, 1, 1]);
        let launch = launch.mat_mut(&mut dlogits).mat(logits).vector(lse).vector(labels).size(first);
        // SAFETY: the kernel touches `n` rows of `cols` elements, and `n` elements of each vector.
        unsafe { launch.vector(scale).size(cols).size(pieces).launch() }
    }
}
