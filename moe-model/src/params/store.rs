//! Weights and gradients of one rank on its device.

use moe_kernels::{Device, Element, Float, Tensor, View, ViewMut};

use super::layout::{BucketLayout, BufferId, ParamId, ParamLayout};
use crate::{Error, Result};

/// A weight to read and its gradient to add to.
pub type WeightAndGrad<'a, T, D> = (View<'a, T, D>, ViewMut<'a, <T as Float>::Acc, D>);

/// Weights in `T` and gradients in `T::Acc`, flat by bucket; buffers in `T::Acc`.
///
/// Gradients live from [`zero_grads`](Self::zero_grads) to [`take_grads`](Self::take_grads): what was handed to a
/// collective is never written again.
#[derive(Debug)]
pub struct ParamStore<T: Float, D: Device> {
    layout: ParamLayout,
    weights: Vec<Tensor<T, D>>,
    grads: Vec<Option<Tensor<T::Acc, D>>>,
    buffers: Vec<Tensor<T::Acc, D>>,
}

impl<T: Float, D: Device> ParamStore<T, D> {
    /// Weights at their starting values, which depend on `seed` and names alone: rounded to `T::Acc`, then to `T`.
    pub fn new(layout: ParamLayout, seed: u64, device: &D) -> Result<Self> {
        let weights = layout
            .buckets()
            .iter()
            .map(|bucket| {
                let values: Vec<T> = bucket
                    .initial(seed, 0..bucket.len)
                    .into_iter()
                    .map(|x| T::from_acc(T::Acc::from_f64(x)))
                    .collect();
                Tensor::from_slice(device, 1, bucket.len, &values)
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let grads = weights.iter().map(|_| None).collect();
        let buffers = layout.buffers().map(|(_, buffer)| Tensor::zeros(device, 1, buffer.len));
        let buffers = buffers.collect::<std::result::Result<_, _>>()?;
        Ok(ParamStore { layout, weights, grads, buffers })
    }

    /// Where everything lies.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    /// The buckets, in an order that is the same on all ranks of a stage.
    pub fn buckets(&self) -> &[BucketLayout] {
        self.layout.buckets()
    }

    /// A weight, `[rows, cols]` as laid out.
    pub fn weight(&self, id: ParamId) -> Result<View<'_, T, D>> {
        let slot = self.layout.slot(id);
        let flat = self.weights[slot.bucket].view();
        Ok(flat.columns(slot.offset..slot.offset + slot.rows * slot.cols)?.reshape(slot.rows, slot.cols)?)
    }

    /// The gradient of a weight, to add to.
    pub fn grad(&mut self, id: ParamId) -> Result<ViewMut<'_, T::Acc, D>> {
        let slot = self.layout.slot(id);
        let flat = self.grads[slot.bucket].as_mut().ok_or(Error::NoGradients)?.view_mut()?;
        Ok(flat.columns(slot.offset..slot.offset + slot.rows * slot.cols)?.reshape(slot.rows, slot.cols)?)
    }

    /// A weight to read and its gradient to add to.
    pub fn weight_and_grad(&mut self, id: ParamId) -> Result<WeightAndGrad<'_, T, D>> {
        let slot = self.layout.slot(id);
        let range = slot.offset..slot.offset + slot.rows * slot.cols;
        let weight =
            self.weights[slot.bucket].view().columns(range.clone())?.reshape(slot.rows, slot.cols)?;
        let grad = self.grads[slot.bucket].as_mut().ok_or(Error::NoGradients)?.view_mut()?;
        Ok((weight, grad.columns(range)?.reshape(slot.rows, slot.cols)?))
    }

    /// Fresh gradients of zero.
    pub fn zero_grads(&mut self, device: &D) -> Result<()> {
        for (grad, bucket) in self.grads.iter_mut().zip(self.layout.buckets()) {
            *grad = Some(Tensor::zeros(device, 1, bucket.len)?);
        }
        Ok(())
    }

    /// Hands over a bucket's gradients, `[1, len]`.
    pub fn take_grads(&mut self, bucket: usize) -> Result<Tensor<T::Acc, D>> {
        self.grads[bucket].take().ok_or(Error::NoGradients)
    }

    /// A bucket's weights, `[1, len]`.
    pub fn weights(&self, bucket: usize) -> &Tensor<T, D> {
        &self.weights[bucket]
    }

    /// Replaces a bucket's weights, `[1, len]`.
    pub fn set_weights(&mut self, bucket: usize, weights: Tensor<T, D>) -> Result<()> {
        let expected = self.layout.buckets()[bucket].len;
        let [rows, cols] = weights.shape();
        if rows * cols != expected {
            return Err(Error::BucketLength { expected, got: rows * cols, dtype: <T as Element>::DTYPE });
        }
        self.weights[bucket] = weights.reshape(1, expected)?;
        Ok(())
    }

    /// A buffer, `[1, len]`.
    pub fn buffer(&self, id: BufferId) -> &Tensor<T::Acc, D> {
        &self.buffers[id.0]
    }

    /// Replaces a buffer, `[1, len]`.
    ///
    /// # Errors
    /// [`Error::BufferLength`].
    pub fn set_buffer(&mut self, id: BufferId, values: Tensor<T::Acc, D>) -> Result<()> {
        let (expected, [rows, cols]) = (self.buffers[id.0].shape()[1], values.shape());
        if rows * cols != expected {
            return Err(Error::BufferLength { expected, got: rows * cols });
        }
        self.buffers[id.0] = values.reshape(1, expected)?;
        Ok(())
    }
}
