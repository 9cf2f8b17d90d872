//! Vocabulary-parallel cross-entropy.

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Loss;
use crate::{Result, View, ViewMut};

/// The column of a label in a block of the vocabulary, if it lies there.
fn column(label: i32, first: usize, cols: usize) -> Option<usize> {
    usize::try_from(label).ok()?.checked_sub(first).filter(|&c| c < cols)
}

simd! {
    fn forward<T>(lse: &mut [T], target: &mut [T], logits: Mat<'_, T>, labels: &[i32], first: usize) {
        let mut scratch = vec![T::ZERO; logits.cols()];
        for (i, (lse, target)) in lse.iter_mut().zip(target).enumerate() {
            let row = logits.row(i);
            let max = lanes::max(row);
            *lse = if max == T::NEG_INFINITY {
                // No column at all, or none that is possible; a NaN must still be seen.
                row.iter().fold(max, |sum, &x| sum + x)
            } else {
                scratch.copy_from_slice(row);
                max + lanes::exp_sum(&mut scratch, max).ln()
            };
            *target = column(labels[i], first, row.len()).map_or(T::ZERO, |c| row[c]);
        }
    }

    fn backward<T>(logits: MatMut<'_, T>, lse: &[T], labels: &[i32], first: usize, scale: &[T]) {
        for (i, (&lse, &scale)) in lse.iter().zip(scale).enumerate() {
            let row = logits.row(i);
            let label = column(labels[i], first, row.len()).map(|c| (c, row[c]));
            for x in row.iter_mut() {
                *x = scale * (*x - lse).exp();
            }
            if let Some((c, x)) = label {
                row[c] = scale * ((x - lse).exp() - T::ONE);
            }
        }
    }
}

impl<T: CpuFloat> Loss<T> for Cpu {
    fn cross_entropy(
        &self,
        mut lse: ViewMut<'_, T, Self>,
        mut target: ViewMut<'_, T, Self>,
        logits: View<'_, T, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy";
        let [n, cols] = check::cross_entropy(KERNEL, &lse, &target, logits, labels)?;
        let (logits, labels) = (Mat::from(logits), Mat::from(labels).vector());
        let (mut lse, mut target) = (MatMut::from(&mut lse).vector(), MatMut::from(&mut target).vector());
        let tasks = blocks(n, rows_per_piece(cols))
            .map(|r| {
                let outputs = (take(&mut lse, r.len()), take(&mut target, r.len()));
                (outputs, logits.row_range(r.clone()), &labels[r])
            })
            .collect();
        self.for_each(tasks, |((lse, target), logits, labels)| forward(lse, target, logits, labels, first))
    }

    fn merge_lse(&self, mut lse: ViewMut<'_, T, Self>, parts: View<'_, T, Self>) -> Result<()> {
        let [_, n] = parts.shape();
        check::shape("merge_lse", "lse", [1, n], lse.shape())?;
        let parts = Mat::from(parts);
        for (i, lse) in MatMut::from(&mut lse).vector().iter_mut().enumerate() {
            let column = || parts.iter().map(|row| row[i]);
            let max = column().fold(T::NEG_INFINITY, |max, x| if max < x { x } else { max });
            *lse = if max == T::NEG_INFINITY {
                column().fold(max, |sum, x| sum + x)
            } else {
                max + column().fold(T::ZERO, |sum, x| sum + (x - max).exp()).ln()
            };
        }
        Ok(())
    }

    fn cross_entropy_backward(
        &self,
        mut logits: ViewMut<'_, T, Self>,
        lse: View<'_, T, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
        scale: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "cross_entropy_backward";
        let [n, cols] = check::cross_entropy_backward(KERNEL, &logits, lse, labels, scale)?;
        let [lse, scale] = [lse, scale].map(|vector| Mat::from(vector).vector());
        let labels = Mat::from(labels).vector();
        let mut logits = MatMut::from(&mut logits);
        let tasks = blocks(n, rows_per_piece(cols)).map(|r| (logits.take_rows(r.len()), r)).collect();
        self.for_each(tasks, |(logits, r)| {
            backward(logits, &lse[r.clone()], &labels[r.clone()], first, &scale[r]);
        })
    }
}
