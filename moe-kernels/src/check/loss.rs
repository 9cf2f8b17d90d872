//! Cross-entropy.

use super::shape;
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `cross_entropy`: `[n, V_block]`, the shape of the logits.
pub(crate) fn cross_entropy<T: Float, D: Device>(
    kernel: &'static str,
    lse: &ViewMut<'_, T::Acc, D>,
    target: &ViewMut<'_, T::Acc, D>,
    logits: View<'_, T, D>,
    labels: View<'_, i32, D>,
) -> Result<[usize; 2]> {
    let [n, cols] = logits.shape();
    shape(kernel, "lse", [1, n], lse.shape())?;
    shape(kernel, "target", [1, n], target.shape())?;
    shape(kernel, "labels", [1, n], labels.shape())?;
    Ok([n, cols])
}

/// Operands of `cross_entropy_backward`: `[n, V_block]`, the shape of the logits.
pub(crate) fn cross_entropy_backward<T: Float, D: Device>(
    kernel: &'static str,
    logits: &ViewMut<'_, T, D>,
    lse: View<'_, T::Acc, D>,
    labels: View<'_, i32, D>,
    scale: View<'_, T::Acc, D>,
) -> Result<[usize; 2]> {
    let [n, cols] = logits.shape();
    shape(kernel, "lse", [1, n], lse.shape())?;
    shape(kernel, "labels", [1, n], labels.shape())?;
    shape(kernel, "scale", [1, n], scale.shape())?;
    Ok([n, cols])
}
