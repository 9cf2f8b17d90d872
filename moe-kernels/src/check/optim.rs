//! Optimizer updates.

use super::{argument, shape};
use crate::family::{AdamW, AdamWRun, AdamWSlice};
use crate::{Device, Element, Float, Result};

/// Operands of `adamw`.
pub(crate) fn adamw<T: Float, D: Device>(
    kernel: &'static str,
    slices: &[AdamWSlice<'_, T, D>],
    update: &AdamW,
) -> Result<()> {
    argument(kernel, update.step > 0, || "updates are numbered from 1".to_owned())?;
    slices.iter().try_for_each(|slice| adamw_slice(kernel, slice))
}

fn adamw_slice<T: Float, D: Device>(kernel: &'static str, slice: &AdamWSlice<'_, T, D>) -> Result<()> {
    let [_, n] = slice.grad.shape();
    shape(kernel, "grad", [1, n], slice.grad.shape())?;
    shape(kernel, "weight", [1, n], slice.weight.shape())?;
    argument(kernel, slice.remainder.is_none() == T::is_acc(), || match T::is_acc() {
        true => format!("a remainder of weights in {}, which are their own masters", T::DTYPE),
        false => format!("no remainder of weights in {}, whose masters are in {}", T::DTYPE, T::Acc::DTYPE),
    })?;
    if let Some(remainder) = &slice.remainder {
        shape(kernel, "remainder", [1, n], remainder.shape())?;
    }
    shape(kernel, "m", [1, n], slice.m.shape())?;
    shape(kernel, "v", [1, n], slice.v.shape())?;
    let mut end = 0;
    for AdamWRun { elements, .. } in slice.runs {
        let fits = end <= elements.start && elements.start <= elements.end && elements.end <= n;
        argument(kernel, fits, || {
            format!("a run of elements {elements:?} after one that ends at {end}, of {n} elements")
        })?;
        end = elements.end;
    }
    Ok(())
}
