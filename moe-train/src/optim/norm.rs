//! The global gradient norm: every logical element once, in an order that no mapping changes.

use std::collections::BTreeMap;

use moe_comm::Reduction;
use moe_kernels::{Backend, Float, Tensor};
use moe_model::Cx;
use moe_topology::Attention;

use super::shard::sliced_parts;
use crate::Result;

/// The names of all logical tensors of a model, sorted: the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamNames(BTreeMap<String, usize>);

impl ParamNames {
    /// From the names in any order.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let sorted: std::collections::BTreeSet<String> = names.into_iter().collect();
        ParamNames(sorted.into_iter().enumerate().map(|(at, name)| (name, at)).collect())
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True without tensors.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The Euclidean norm of the whole gradient, before clipping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradNorm(pub f64);

impl GradNorm {
    /// From every rank's slices of the reduced gradients. Squares are summed in f64 per parameter, then over the world,
    /// then in name order. Collective over the world.
    pub fn of<T: Float, D: Backend<T>>(
        cx: &Cx<T, D>,
        grads: &[Tensor<T::Acc, D>],
        names: &ParamNames,
    ) -> Result<Self> {
        let device = &cx.device;
        let mut squares = vec![0.0; names.len()];
        for (bucket, grad) in cx.params.buckets().iter().zip(grads) {
            for (part, range) in sliced_parts(bucket).filter(|(part, _)| part.counts) {
                let at = range.start - bucket.slice.start;
                let piece = grad.view().columns(at..at + range.len())?;
                let mut sum = Tensor::<f64, D>::zeros(device, 1, 1)?;
                device.dot(sum.view_mut()?, piece, piece)?;
                squares[names.0[&part.name]] += sum.to_vec(device)?[0];
            }
        }
        let squares = cx.comms.group(Attention::ALL)?.all_reduce_host(&squares, Reduction::Sum)?;
        Ok(GradNorm(squares.into_iter().sum::<f64>().sqrt()))
    }

    /// The factor that clips the gradient to norm `max` (0: no clipping): `min(1, max / (‖g‖ + 1e-6))`.
    pub fn clip_factor(self, max: f64) -> f64 {
        if max > 0.0 { (max / (self.0 + 1e-6)).min(1.0) } else { 1.0 }
    }

    /// Whether an update may be made; the same on every rank, as the norm is.
    pub fn is_finite(self) -> bool {
        self.0.is_finite()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_down_and_never_up() {
        assert_eq!(GradNorm(0.5).clip_factor(1.0), 1.0);
        assert!((GradNorm(4.0).clip_factor(1.0) - 1.0 / 4.000001).abs() < 1e-15);
        assert_eq!(GradNorm(4.0).clip_factor(0.0), 1.0);
        assert!(!GradNorm(f64::NAN).is_finite());
    }
}
