//! Optimizer updates.

use super::{argument, shape};
use crate::family::{AdamW, MomentMut};
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `adamw`: the number of elements.
pub(crate) fn adamw<T: Float, D: Device>(
    kernel: &'static str,
    weight: Option<&ViewMut<'_, T, D>>,
    master: &ViewMut<'_, T::Acc, D>,
    m: &MomentMut<'_, T::Acc, D>,
    v: &MomentMut<'_, T::Acc, D>,
    grad: View<'_, T::Acc, D>,
    hyper: &AdamW,
) -> Result<usize> {
    let [_, n] = grad.shape();
    shape(kernel, "grad", [1, n], grad.shape())?;
    if let Some(weight) = weight {
        shape(kernel, "weight", [1, n], weight.shape())?;
    }
    shape(kernel, "master", [1, n], master.shape())?;
    shape(kernel, "m", [1, n], m.shape())?;
    shape(kernel, "v", [1, n], v.shape())?;
    argument(kernel, hyper.step > 0, || "updates are numbered from 1".to_owned())?;
    Ok(n)
}
