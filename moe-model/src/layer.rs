//! The shape of a layer: forward, and backward in two halves.

use moe_kernels::{Backend, Device, Float, Tensor};

use crate::{Cx, Result};

/// Hidden states between two layers, `[tokens of this rank, hidden]`: `x`, and what the layer before adds to it over its residual
/// connection. The sum is left to whoever needs it: a norm makes it in passing.
#[derive(Debug)]
pub struct Hidden<T: Float, D: Device> {
    /// One summand.
    pub x: Tensor<T, D>,
    /// The other, if there is one.
    pub added: Option<Tensor<T, D>>,
}

impl<T: Float, D: Device> From<Tensor<T, D>> for Hidden<T, D> {
    fn from(x: Tensor<T, D>) -> Self {
        Hidden { x, added: None }
    }
}

impl<T: Float, D: Backend<T>> Hidden<T, D> {
    /// The sum.
    pub fn sum(self, device: &D) -> Result<Tensor<T, D>> {
        let Hidden { x, added: Some(added) } = self else { return Ok(self.x) };
        let mut y = Tensor::uninit(device, x.shape()[0], x.shape()[1])?;
        device.add(y.view_mut()?, x.view(), added.view())?;
        Ok(y)
    }
}

/// What a layer's forward pass gives: its output, and what backward needs.
pub type Passed<T, D, Saved> = (Hidden<T, D>, Saved);

/// A layer with explicit forward and backward.
///
/// `Saved` is what backward needs of a forward pass, `Deferred` what the weight gradients need of the input gradient:
/// both are the caller's, so that several micro-batches can be in flight and a schedule can delay weight gradients.
/// Small weight gradients (norms, router) are added in [`backward_input`](Layer::backward_input). All weight gradients
/// are added in ascending micro-batch order as long as the caller calls in that order.
pub trait Layer<T: Float, D: Backend<T>> {
    /// Kept from forward to the input gradient.
    type Saved;
    /// Kept from the input gradient to the weight gradients.
    type Deferred;

    /// From hidden states to hidden states; `m` is the micro-batch.
    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>>;

    /// Gradient of the input.
    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)>;

    /// Adds to the weight gradients.
    fn backward_weight(&self, m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()>;
}
