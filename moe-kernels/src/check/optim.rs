//! Optimizer updates.

use super::{argument, shape};
use crate::family::{AdamW, AdamWRun, AdamWSlice};
use crate::{Device, Float, Result};

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
    if let Some(weight) = &slice.weight {
        shape(kernel, "weight", [1, n], weight.shape())?;
    }
    shape(kernel, "master", [1, n], slice.master.shape())?;
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
