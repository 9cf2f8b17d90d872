//! Heads normed and rotated by the kernels of either.

use super::{Norm, Rope, RotaryHead, Rotation, Rows};
use crate::{Float, Result, Tensor, View, ViewMut, check};

/// [`Rope::rms_norm_rope`] of its two kernels.
#[allow(clippy::too_many_arguments)] // the operands of both
pub(crate) fn norm_then_rope<T: Float, D: Rope<T> + Norm<T> + Rows<T>>(
    device: &D,
    y: ViewMut<'_, T, D>,
    rstd: ViewMut<'_, T::Acc, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    cos: View<'_, T::Acc, D>,
    sin: View<'_, T::Acc, D>,
    positions: View<'_, i32, D>,
    head: RotaryHead,
    eps: f64,
) -> Result<()> {
    let [n, width] = x.shape();
    check::rms_norm_rope("rms_norm_rope", &y, &rstd, x, w, cos, sin, positions, head)?;
    let mut by_head = Tensor::uninit(device, n * width / head.head_dim, head.head_dim)?;
    let [rows, cols] = by_head.shape();
    let copied;
    let x = match x.layout().is_contiguous() {
        true => x,
        false => {
            copied = gathered(device, x)?;
            copied.view()
        }
    };
    device.rms_norm(by_head.view_mut()?, rstd, x.reshape(rows, cols)?, w, eps)?;
    device.rope(y, by_head.view().reshape(n, width)?, cos, sin, positions, head, Rotation::Forward)
}

/// [`Rope::rms_norm_rope_backward`] of its two kernels.
#[allow(clippy::too_many_arguments)] // the operands of both
pub(crate) fn norm_then_rope_backward<T: Float, D: Rope<T> + Norm<T> + Rows<T>>(
    device: &D,
    mut dx: ViewMut<'_, T, D>,
    dw: ViewMut<'_, T::Acc, D>,
    dy: View<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    rstd: View<'_, T::Acc, D>,
    cos: View<'_, T::Acc, D>,
    sin: View<'_, T::Acc, D>,
    positions: View<'_, i32, D>,
    head: RotaryHead,
) -> Result<()> {
    let [n, width] = x.shape();
    const KERNEL: &str = "rms_norm_rope_backward";
    check::rms_norm_rope_backward(KERNEL, &dx, &dw, dy, x, w, rstd, cos, sin, positions, head)?;
    let mut turned = Tensor::uninit(device, n, width)?;
    device.rope(turned.view_mut()?, dy, cos, sin, positions, head, Rotation::Backward)?;
    let [rows, cols] = [n * width / head.head_dim, head.head_dim];
    let dy = turned.view().reshape(rows, cols)?;
    let copied;
    let x = match x.layout().is_contiguous() {
        true => x,
        false => {
            copied = gathered(device, x)?;
            copied.view()
        }
    }
    .reshape(rows, cols)?;
    if dx.layout().is_contiguous() {
        return device.rms_norm_backward(dx.reshape(rows, cols)?, dw, dy, x, w, rstd, None);
    }
    let mut whole = Tensor::uninit(device, rows, cols)?;
    device.rms_norm_backward(whole.view_mut()?, dw, dy, x, w, rstd, None)?;
    device.copy_rows(dx.reborrow(), whole.view().reshape(n, width)?)
}

/// The same rows without gaps.
fn gathered<T: Float, D: Rows<T>>(device: &D, x: View<'_, T, D>) -> Result<Tensor<T, D>> {
    let [n, width] = x.shape();
    let mut whole = Tensor::uninit(device, n, width)?;
    device.copy_rows(whole.view_mut()?, x)?;
    Ok(whole)
}
