//! The shape of a layer: forward, and backward in two halves.

use moe_kernels::{Backend, Float, Tensor};

use crate::{Cx, Result};

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

    /// `x, y: [tokens of this rank, hidden]`; `m` is the micro-batch.
    fn forward(&self, m: u32, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<(Tensor<T, D>, Self::Saved)>;

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
