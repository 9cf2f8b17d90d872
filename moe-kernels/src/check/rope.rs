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
