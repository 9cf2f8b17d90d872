//! Gated activations.

use super::shape;
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `glu`: `[n, I]`, the shape of `y`.
pub(crate) fn glu<T: Float, D: Device>(
    kernel: &'static str,
    y: [usize; 2],
    gate_up: View<'_, T, D>,
    p: Option<View<'_, T::Acc, D>>,
) -> Result<[usize; 2]> {
    let [n, width] = y;
    shape(kernel, "gate_up", [n, 2 * width], gate_up.shape())?;
    if let Some(p) = p {
        shape(kernel, "p", [1, n], p.shape())?;
    }
    Ok([n, width])
}

/// Operands of `glu_backward`: `[n, I]`, the shape of `dy`.
pub(crate) fn glu_backward<T: Float, D: Device>(
    kernel: &'static str,
    dgate_up: &ViewMut<'_, T, D>,
    dp: Option<&ViewMut<'_, T::Acc, D>>,
    dy: View<'_, T, D>,
    gate_up: View<'_, T, D>,
    p: Option<View<'_, T::Acc, D>>,
) -> Result<[usize; 2]> {
    let [n, width] = glu(kernel, dy.shape(), gate_up, p)?;
    shape(kernel, "dgate_up", [n, 2 * width], dgate_up.shape())?;
    if let Some(dp) = dp {
        shape(kernel, "dp", [1, n], dp.shape())?;
    }
    Ok([n, width])
}

/// Operands of `sigmoid_gate`, and of its gradient, whose result has the shape `y`: `[n, H]`.
pub(crate) fn sigmoid_gate<T: Float, D: Device>(
    kernel: &'static str,
    y: [usize; 2],
    x: View<'_, T, D>,
    gate: View<'_, T, D>,
) -> Result<[usize; 2]> {
    shape(kernel, "x", y, x.shape())?;
    shape(kernel, "gate", [y[0], 1], gate.shape())?;
    Ok(y)
}
