//! Attention.

use super::{argument, shape};
use crate::family::{AttentionMask, AttentionShape};
use crate::{Device, Float, Result, View, ViewMut};

/// An operand's name and shape.
type Named = (&'static str, [usize; 2]);

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

/// Operands of `attention_merge`: `[n, heads]`, the shape of `lse`.
pub(crate) fn attention_merge<T: Float, D: Device>(
    kernel: &'static str,
    o: &ViewMut<'_, T::Acc, D>,
    lse: &ViewMut<'_, T::Acc, D>,
    o_part: View<'_, T, D>,
    lse_part: View<'_, T::Acc, D>,
    v_head_dim: usize,
) -> Result<[usize; 2]> {
    let [n, heads] = lse.shape();
    argument(kernel, v_head_dim > 0, || "v_head_dim is 0".to_owned())?;
    shape(kernel, "o", [n, heads * v_head_dim], o.shape())?;
    shape(kernel, "o_part", [n, heads * v_head_dim], o_part.shape())?;
    shape(kernel, "lse_part", [n, heads], lse_part.shape())?;
    Ok([n, heads])
}
