//! What every kernel checks at its boundary.

use std::ops::Range;

use crate::family::{ColumnBlocks, RotaryHead};
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

/// An error unless `count` blocks of `width` columns lie within `cols`.
pub(crate) fn column_blocks(
    kernel: &'static str,
    what: &'static str,
    at: ColumnBlocks,
    count: usize,
    width: usize,
    cols: usize,
) -> Result<()> {
    let last = count.checked_sub(1).map(|last| at.first + last * at.step + width);
    argument(kernel, last.is_none_or(|end| end <= cols), || {
        format!("{count} blocks of {width} columns, {at:?}, exceed the {cols} columns of {what}")
    })
}

/// The range, or an error unless it lies inside `len` bytes.
pub(crate) fn bytes(range: Range<usize>, len: usize) -> Result<Range<usize>> {
    if range.start > range.end || range.end > len {
        return Err(Error::OutOfBounds { start: range.start, end: range.end, len });
    }
    Ok(range)
}

/// An error unless rows of `width` are whole heads, with room in each for the pairs that as many angles turn.
pub(crate) fn rotary_head(kernel: &'static str, head: RotaryHead, width: usize, angles: usize) -> Result<()> {
    let RotaryHead { head_dim, first, .. } = head;
    argument(kernel, head_dim > 0 && width.is_multiple_of(head_dim), || {
        format!("head_dim {head_dim} is zero or no divisor of width {width}")
    })?;
    argument(kernel, first + 2 * angles <= head_dim, || {
        format!("a rotated part of 2·{angles} from {first} on exceeds head_dim {head_dim}")
    })
}
