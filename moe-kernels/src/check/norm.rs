//! Root-mean-square normalisation.

use super::shape;
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `rms_norm`, with the sums of `rms_norm_part`: `[n, H]`, the shape of `x`.
pub(crate) fn rms_norm<T: Float, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, T, D>,
    rstd: &ViewMut<'_, T::Acc, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    sums: Option<View<'_, T::Acc, D>>,
) -> Result<[usize; 2]> {
    let [n, h] = x.shape();
    shape(kernel, "y", [n, h], y.shape())?;
    shape(kernel, "rstd", [1, n], rstd.shape())?;
    shape(kernel, "w", [1, h], w.shape())?;
    if let Some(sums) = sums {
        shape(kernel, "sums", [1, n], sums.shape())?;
    }
    Ok([n, h])
}

/// Operands of `rms_norm_backward`, with the sums of `rms_norm_part_backward`: `[n, H]`, the shape of `x`.
#[allow(clippy::too_many_arguments)] // the operands of the formula
pub(crate) fn rms_norm_backward<T: Float, D: Device>(
    kernel: &'static str,
    dx: &ViewMut<'_, T, D>,
    dw: &ViewMut<'_, T::Acc, D>,
    dy: View<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    rstd: View<'_, T::Acc, D>,
    past: Option<View<'_, T, D>>,
    sums: Option<View<'_, T::Acc, D>>,
) -> Result<[usize; 2]> {
    let [n, h] = x.shape();
    shape(kernel, "dx", [n, h], dx.shape())?;
    shape(kernel, "dw", [1, h], dw.shape())?;
    shape(kernel, "dy", [n, h], dy.shape())?;
    shape(kernel, "w", [1, h], w.shape())?;
    shape(kernel, "rstd", [1, n], rstd.shape())?;
    if let Some(past) = past {
        shape(kernel, "past", [n, h], past.shape())?;
    }
    if let Some(sums) = sums {
        shape(kernel, "sums", [1, n], sums.shape())?;
    }
    Ok([n, h])
}

/// Operands of `rms_norm_backward_sums`: `[n, H]`, the shape of `x`.
pub(crate) fn rms_norm_backward_sums<T: Float, D: Device>(
    kernel: &'static str,
    sums: &ViewMut<'_, T::Acc, D>,
    dy: View<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
) -> Result<[usize; 2]> {
    let [n, h] = x.shape();
    shape(kernel, "sums", [1, n], sums.shape())?;
    shape(kernel, "dy", [n, h], dy.shape())?;
    shape(kernel, "w", [1, h], w.shape())?;
    Ok([n, h])
}
