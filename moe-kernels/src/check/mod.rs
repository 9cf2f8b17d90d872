//! What every kernel checks at its boundary, on any device: what is common to all here, what a family asks for in a file of its name.

mod activation;
mod attention;
mod balance;
mod gemm;
mod loss;
mod norm;
mod optim;
mod rope;
mod routing;
mod rows;

use std::ops::Range;

pub(crate) use activation::{glu, glu_backward, sigmoid_gate};
pub(crate) use attention::{attention, attention_merge, first_keys};
pub(crate) use balance::{
    balance_dot, balance_gradient, balance_sums, count_choices, count_dropped, sum_counts,
};
pub(crate) use gemm::{gemm_backward, grouped_gemm, grouped_gemm_acc, grouped_glu_backward, groups, product};
pub(crate) use loss::{cross_entropy, cross_entropy_backward};
pub(crate) use norm::{rms_norm, rms_norm_backward, rms_norm_backward_sums};
pub(crate) use optim::adamw;
pub(crate) use rope::{rms_norm_rope, rms_norm_rope_backward, rope};
pub(crate) use routing::{drop_excess, jitter, route, route_backward, softmax_sums, sort_by_expert};
pub(crate) use rows::{copy_column_blocks, gather_rows, gather_sum, spread_rows, sum_column_blocks};

use crate::{Error, Result};

/// An error unless `got` is `expected`.
pub(crate) fn shape(
    kernel: &'static str,
    what: &'static str,
    expected: [usize; 2],
    got: [usize; 2],
) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { kernel, what, expected, got }) }
}

/// An error unless `holds`; `what` says which condition failed, with the values.
pub(crate) fn argument(kernel: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Argument { kernel, what: what() }) }
}

/// An error unless all indices are below `end`; negative ones are the kernel's to give a meaning to.
pub(crate) fn indices<'a>(
    kernel: &'static str,
    what: &'static str,
    indices: impl IntoIterator<Item = &'a i32>,
    end: usize,
) -> Result<()> {
    match indices.into_iter().find(|&&i| i >= 0 && i as usize >= end) {
        None => Ok(()),
        Some(i) => Err(Error::Argument { kernel, what: format!("{what} {i} is not below {end}") }),
    }
}

/// The range, or an error unless it lies inside `len` bytes.
pub(crate) fn bytes(range: Range<usize>, len: usize) -> Result<Range<usize>> {
    if range.start > range.end || range.end > len {
        return Err(Error::OutOfBounds { start: range.start, end: range.end, len });
    }
    Ok(range)
}
