//! What every kernel checks at its boundary.

use std::ops::Range;

use crate::family::{AttentionMask, AttentionShape, ColumnBlocks, ExpertGroups, RotaryHead, Scoring};
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

/// An error unless `op(a) · op(b)` has the shape of `y`; the shapes are those of `y`, `op(a)` and `op(b)`.
pub(crate) fn product(kernel: &'static str, y: [usize; 2], a: [usize; 2], b: [usize; 2]) -> Result<()> {
    shape(kernel, "op(a)", [y[0], b[0]], a)?;
    shape(kernel, "op(b)", [a[1], y[1]], b)
}

/// An operand's name and shape.
pub(crate) type Named = (&'static str, [usize; 2]);

/// An error unless the sizes of attention are sound, and its operands have the shapes that they ask for.
pub(crate) fn attention(
    kernel: &'static str,
    s: &AttentionShape,
    queries: &[Named],
    keys: &[Named],
    outputs: &[Named],
    values: &[Named],
    lse: [usize; 2],
) -> Result<()> {
    let AttentionShape { batch, head_dim, v_head_dim, kv_heads, .. } = *s;
    argument(kernel, batch > 0 && head_dim > 0 && v_head_dim > 0 && kv_heads > 0, || {
        format!(
            "batch {batch}, head_dim {head_dim}, v_head_dim {v_head_dim} and kv_heads {kv_heads} must be positive"
        )
    })?;
    argument(kernel, s.heads.is_multiple_of(s.kv_heads), || {
        format!("kv_heads {} does not divide heads {}", s.kv_heads, s.heads)
    })?;
    let sees = s.mask != AttentionMask::SlidingWindow { window: 0 };
    argument(kernel, sees, || "a window of 0 keys".to_owned())?;
    let (q_rows, kv_rows) = (s.q_len * batch, s.kv_len * batch);
    for (operands, expected) in [
        (queries, [q_rows, s.heads * head_dim]),
        (keys, [kv_rows, kv_heads * head_dim]),
        (outputs, [q_rows, s.heads * v_head_dim]),
        (values, [kv_rows, kv_heads * v_head_dim]),
    ] {
        for &(what, got) in operands {
            shape(kernel, what, expected, got)?;
        }
    }
    shape(kernel, "lse", [q_rows, s.heads], lse)
}

/// An error unless there is a first key for every row of queries, where there are first keys.
pub(crate) fn first_keys(kernel: &'static str, s: &AttentionShape, got: Option<[usize; 2]>) -> Result<()> {
    got.map_or(Ok(()), |got| shape(kernel, "first_keys", [1, s.q_len * s.batch], got))
}

/// Refuses a choice of `k` among so many `experts` that a scoring does not allow, and a bias, of this shape, that it does not take.
pub(crate) fn scoring(
    kernel: &'static str,
    scoring: &Scoring,
    experts: usize,
    k: usize,
    bias: Option<[usize; 2]>,
) -> Result<()> {
    argument(kernel, (1..=experts).contains(&k), || format!("{k} of {experts} experts cannot be chosen"))?;
    if let Some(bias) = bias {
        shape(kernel, "bias", [1, experts], bias)?;
        argument(kernel, scoring.function.is_separate() || scoring.groups.is_none(), || {
            "a softmax takes no bias where there are groups".to_owned()
        })?;
    }
    let Some(ExpertGroups { count, kept, score_top_k }) = scoring.groups else { return Ok(()) };
    let size = experts.checked_div(count).unwrap_or(0);
    let legal = count > 0
        && experts.is_multiple_of(count)
        && (1..=count).contains(&kept)
        && (1..=size).contains(&score_top_k)
        && k <= kept * size;
    argument(kernel, legal, || {
        format!(
            "{k} of {experts} experts cannot be chosen from {kept} of {count} groups by their {score_top_k} best"
        )
    })
}
