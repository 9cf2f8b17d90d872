//! From one element type to another.

use moe_kernels::family::Elementwise;
use moe_kernels::{Backend, Element, Float, Tensor, View};

use crate::Error;

/// True if `T` is its own accumulation type, so that its bytes need no conversion.
fn is_wide<T: Float>() -> bool {
    T::DTYPE == <T::Acc as Element>::DTYPE
}

/// `x` in the accumulation type: the same memory if that is `T`, else a copy in `hold`.
pub(super) fn widened<'a, T: Float, D: Backend<T>>(
    device: &D,
    x: View<'a, T, D>,
    hold: &'a mut Option<Tensor<T::Acc, D>>,
) -> Result<View<'a, T::Acc, D>, Error> {
    if is_wide::<T>() {
        return Ok(View::new(x.buf(), x.layout())?);
    }
    Ok(hold.insert(copied(device, x)?).view())
}

/// A copy of `x` in the accumulation type.
pub(super) fn copied<T: Float, D: Backend<T>>(
    device: &D,
    x: View<'_, T, D>,
) -> Result<Tensor<T::Acc, D>, Error> {
    let [rows, cols] = x.shape();
    let mut wide = Tensor::uninit(device, rows, cols)?;
    Elementwise::<T>::widen(device, wide.view_mut()?, x)?;
    Ok(wide)
}

/// `x` rounded to `T`: the same memory if that is the accumulation type.
pub(super) fn narrowed<T: Float, D: Backend<T>>(
    device: &D,
    x: Tensor<T::Acc, D>,
) -> Result<Tensor<T, D>, Error> {
    if is_wide::<T>() {
        return Ok(Tensor::from_buf(x.buf().clone(), x.layout())?);
    }
    let [rows, cols] = x.shape();
    let mut narrow = Tensor::uninit(device, rows, cols)?;
    Elementwise::<T>::narrow(device, narrow.view_mut()?, x.view())?;
    Ok(narrow)
}

/// A copy in f64.
pub(super) fn widened_f64<T: Float, D: Elementwise<T>>(
    device: &D,
    x: View<'_, T, D>,
) -> Result<Tensor<f64, D>, Error> {
    let [rows, cols] = x.shape();
    let mut wide = Tensor::uninit(device, rows, cols)?;
    device.widen_f64(wide.view_mut()?, x)?;
    Ok(wide)
}

/// A copy of `x`, rounded to `T`.
pub(super) fn narrowed_f64<T: Float, D: Elementwise<T>>(
    device: &D,
    x: &Tensor<f64, D>,
) -> Result<Tensor<T, D>, Error> {
    let [rows, cols] = x.shape();
    let mut narrow = Tensor::uninit(device, rows, cols)?;
    device.narrow_f64(narrow.view_mut()?, x.view())?;
    Ok(narrow)
}
