//! Rotary positions.

use super::{argument, shape};
use crate::family::RotaryHead;
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `rope`: rows of whole heads, with room in each for the pairs that as many angles turn.
pub(crate) fn rope<T: Float, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, T, D>,
    x: View<'_, T, D>,
    cos: View<'_, T::Acc, D>,
    sin: View<'_, T::Acc, D>,
    positions: View<'_, i32, D>,
    head: RotaryHead,
) -> Result<()> {
    let RotaryHead { head_dim, first, .. } = head;
    let ([n, width], [table, angles]) = (x.shape(), cos.shape());
    argument(kernel, head_dim > 0 && width.is_multiple_of(head_dim), || {
        format!("head_dim {head_dim} is zero or no divisor of width {width}")
    })?;
    argument(kernel, first + 2 * angles <= head_dim, || {
        format!("a rotated part of 2·{angles} from {first} on exceeds head_dim {head_dim}")
    })?;
    shape(kernel, "y", [n, width], y.shape())?;
    shape(kernel, "sin", [table, angles], sin.shape())?;
    shape(kernel, "positions", [1, n], positions.shape())
}

/// Operands of `rms_norm_rope`.
#[allow(clippy::too_many_arguments)] // the operands of both
pub(crate) fn rms_norm_rope<T: Float, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, T, D>,
    rstd: &ViewMut<'_, T::Acc, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    cos: View<'_, T::Acc, D>,
    sin: View<'_, T::Acc, D>,
    positions: View<'_, i32, D>,
    head: RotaryHead,
) -> Result<()> {
    rope(kernel, y, x, cos, sin, positions, head)?;
    let [n, width] = x.shape();
    shape(kernel, "rstd", [1, n * (width / head.head_dim)], rstd.shape())?;
    shape(kernel, "w", [1, head.head_dim], w.shape())
}

/// Operands of `rms_norm_rope_backward`.
#[allow(clippy::too_many_arguments)] // the operands of both
pub(crate) fn rms_norm_rope_backward<T: Float, D: Device>(
    kernel: &'static str,
    dx: &ViewMut<'_, T, D>,
    dw: &ViewMut<'_, T::Acc, D>,
    dy: View<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    rstd: View<'_, T::Acc, D>,
    cos: View<'_, T::Acc, D>,
    sin: View<'_, T::Acc, D>,
    positions: View<'_, i32, D>,
    head: RotaryHead,
) -> Result<()> {
    rope(kernel, dx, x, cos, sin, positions, head)?;
    let [n, width] = x.shape();
    shape(kernel, "dy", [n, width], dy.shape())?;
    shape(kernel, "dw", [1, head.head_dim], dw.shape())?;
    shape(kernel, "w", [1, head.head_dim], w.shape())?;
    shape(kernel, "rstd", [1, n * (width / head.head_dim)], rstd.shape())
}
