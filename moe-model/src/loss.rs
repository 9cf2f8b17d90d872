//! The loss of a step, summed on the device.

use moe_kernels::family::Reduce;
use moe_kernels::{Device, Float, Result, Tensor, View};

/// Σ w·ce over micro-batches of one rank, added in the order of its calls. It stays on the device until it is asked for, so
/// that no pass waits.
#[derive(Debug)]
pub struct LossSum<D: Device> {
    /// Σ w·lse and Σ w·target, of double precision; nothing before the first tokens.
    sums: Option<[Tensor<f64, D>; 2]>,
}

impl<D: Device> Default for LossSum<D> {
    fn default() -> Self {
        LossSum { sums: None }
    }
}

impl<D: Device> LossSum<D> {
    /// Adds Σ w·(lse − target) over some tokens; all are `[1, n]`.
    pub(crate) fn add<A: Float>(
        &mut self,
        device: &D,
        weights: View<'_, A, D>,
        lse: View<'_, A, D>,
        target: View<'_, A, D>,
    ) -> Result<()>
    where
        D: Reduce<A>,
    {
        let [of_lse, of_target] = match &mut self.sums {
            Some(sums) => sums,
            none => none.insert([Tensor::zeros(device, 1, 1)?, Tensor::zeros(device, 1, 1)?]),
        };
        device.dot(of_lse.view_mut()?, weights, lse)?;
        device.dot(of_target.view_mut()?, weights, target)
    }

    /// The sum; waits for the device. 0 on a rank without a head.
    ///
    /// # Errors
    /// Something failed on the device.
    pub fn total(&self, device: &D) -> Result<f64> {
        let Some([of_lse, of_target]) = &self.sums else { return Ok(0.0) };
        Ok(of_lse.to_vec(device)?[0] - of_target.to_vec(device)?[0])
    }
}
