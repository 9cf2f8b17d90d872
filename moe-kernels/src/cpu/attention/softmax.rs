//! The loops between the matrix products.

use std::ops::Range;

use super::Sight;
use crate::cpu::float::CpuFloat;
use crate::cpu::lanes;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::simd::simd;

/// What of a row is in `range`; the rest becomes 0.
#[inline(always)]
fn keep<T: CpuFloat>(row: &mut [T], range: Range<usize>) -> &mut [T] {
    row[..range.start].fill(T::ZERO);
    row[range.end..].fill(T::ZERO);
    &mut row[range]
}

simd! {
    /// One step of the streaming softmax for the scores of a tile of queries from `first` on: they become
    /// `exp(score − max)` with the new maximum, hidden ones 0; what was summed under the old maximum is rescaled.
    pub(super) fn softmax_step<T>(
        scores: MatMut<'_, T>,
        max: &mut [T],
        sum: &mut [T],
        acc: MatMut<'_, T>,
        sight: Sight<'_>,
        first: usize,
        keys: Range<usize>,
    ) {
        for i in 0..scores.rows() {
            let seen = keep(scores.row(i), sight.visible(first + i, &keys));
            if seen.is_empty() {
                continue;
            }
            let new = {
                let new = lanes::max(seen);
                if new < max[i] { max[i] } else { new }
            };
            if new != max[i] {
                let scale = (max[i] - new).exp();
                sum[i] *= scale;
                for x in acc.row(i) {
                    *x *= scale;
                }
                max[i] = new;
            }
            sum[i] += lanes::exp_sum(seen, new);
        }
    }

    /// Divides by the sums.
    pub(super) fn normalise<T>(acc: MatMut<'_, T>, sum: &[T]) {
        for (i, &sum) in sum.iter().enumerate() {
            let factor = if sum == T::ZERO { T::ZERO } else { T::ONE / sum };
            for x in acc.row(i) {
                *x *= factor;
            }
        }
    }

    /// Turns scores into probabilities `p = exp(score − lse)`, hidden ones 0, and `dp` into the gradient of the
    /// scaled scores, `p ⊙ (dp − delta) · scale`.
    pub(super) fn softmax_backward<T>(
        scores: MatMut<'_, T>,
        dp: MatMut<'_, T>,
        lse: &[T],
        delta: &[T],
        scale: T,
        sight: Sight<'_>,
        first: usize,
        keys: Range<usize>,
    ) {
        for (i, (&lse, &delta)) in lse.iter().zip(delta).enumerate() {
            // A query that sees no key at all has no probabilities.
            let range = if lse == T::NEG_INFINITY { 0..0 } else { sight.visible(first + i, &keys) };
            let seen = keep(scores.row(i), range.clone());
            let dseen = keep(dp.row(i), range);
            for (p, dp) in seen.iter_mut().zip(dseen) {
                *p = (*p - lse).exp();
                *dp = *p * (*dp - delta) * scale;
            }
        }
    }

    /// `Σ d_o ⊙ o` for every row.
    pub(super) fn row_dots<T>(out: &mut [T], a: Mat<'_, T>, b: Mat<'_, T>) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = lanes::sum_by2(a.row(i), b.row(i), |a, b| a * b);
        }
    }

    pub(super) fn merge<T>(o: MatMut<'_, T>, lse: MatMut<'_, T>, o_part: Mat<'_, T>, lse_part: Mat<'_, T>, head_dim: usize) {
        for i in 0..o.rows() {
            let heads = o.row(i).chunks_exact_mut(head_dim).zip(o_part.row(i).chunks_exact(head_dim));
            for ((o, part), (l, &l_part)) in heads.zip(lse.row(i).iter_mut().zip(lse_part.row(i))) {
                let max = if *l < l_part { l_part } else { *l };
                if max == T::NEG_INFINITY {
                    // Neither block has a key for this query.
                    o.fill(T::ZERO);
                    continue;
                }
                let (a, b) = ((*l - max).exp(), (l_part - max).exp());
                let sum = a + b;
                let (wa, wb) = (a / sum, b / sum);
                for (o, &part) in o.iter_mut().zip(part) {
                    *o = *o * wa + part * wb;
                }
                *l = max + sum.ln();
            }
        }
    }
}
