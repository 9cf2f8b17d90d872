//! AdamW on this rank's slices.

use std::ops::Range;

use moe_kernels::family::{AdamW, Optim};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore};

use super::shard::{Shard, gather_weights, shards, sliced_parts, weights_from_master};
use crate::Result;

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices; vectors are not decayed.
    pub weight_decay: f64,
}

/// Master weights and moments of one rank, cut over the groups in which gradients are partial.
#[derive(Debug)]
pub struct Optimizer<T: Float, D: Device> {
    hyper: Hyper,
    shards: Vec<Shard<T::Acc, D>>,
    decay: Vec<Vec<(Range<usize>, bool)>>,
    updates: u64,
}

impl<T: Float, D: Backend<T>> Optimizer<T, D> {
    /// Starting state: master weights as the weights start, moments zero.
    pub fn new(hyper: Hyper, params: &ParamStore<T, D>, seed: u64, device: &D) -> Result<Self> {
        let decay = params.buckets().iter().map(decay_runs).collect();
        Ok(Optimizer { hyper, shards: shards(params, seed, device)?, decay, updates: 0 })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The slices, in bucket order.
    pub fn shards(&self) -> &[Shard<T::Acc, D>] {
        &self.shards
    }

    /// One update from this rank's slices of the reduced gradients, then the gathering of weights. Collective.
    pub fn update(
        &mut self,
        cx: &mut Cx<T, D>,
        grads: &[Tensor<T::Acc, D>],
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let Hyper { beta1, beta2, eps, weight_decay } = self.hyper;
        let mut slices = Vec::with_capacity(self.shards.len());
        for ((shard, grad), runs) in self.shards.iter_mut().zip(grads).zip(&self.decay) {
            let mut weights = Tensor::uninit(&cx.device, 1, grad.shape()[1])?;
            for (run, decays) in runs {
                let hyper = AdamW {
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay: if *decays { weight_decay } else { 0.0 },
                    step: self.updates,
                    grad_scale,
                };
                Optim::<T>::adamw(
                    &cx.device,
                    weights.view_mut()?.columns(run.clone())?,
                    shard.master.view_mut()?.columns(run.clone())?,
                    shard.m.view_mut()?.columns(run.clone())?,
                    shard.v.view_mut()?.columns(run.clone())?,
                    grad.view().columns(run.clone())?,
                    &hyper,
                )?;
            }
            slices.push(weights);
        }
        gather_weights(cx, slices)
    }

    /// Takes over a checkpoint's state and makes its master weights the weights. Collective.
    pub fn restore(&mut self, cx: &mut Cx<T, D>, shards: Vec<Shard<T::Acc, D>>, updates: u64) -> Result<()> {
        self.shards = shards;
        self.updates = updates;
        weights_from_master(cx, &self.shards)
    }
}

/// The slice of a bucket as runs of elements that decay or do not, counted from the slice's start. Padding joins the run
/// before it: its gradient is 0 and its weight is 0, so nothing moves it.
fn decay_runs(bucket: &BucketLayout) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for (part, range) in sliced_parts(bucket) {
        let end = range.end - bucket.slice.start;
        match runs.last_mut() {
            Some((run, decays)) if *decays != part.vector => run.end = end,
            Some((run, _)) => {
                let start = run.end;
                runs.push((start..end, !part.vector));
            }
            None => runs.push((0..end, !part.vector)),
        }
    }
    match runs.last_mut() {
        Some((run, _)) => run.end = bucket.slice.len(),
        None if !bucket.slice.is_empty() => runs.push((0..bucket.slice.len(), false)),
        None => {}
    }
    runs
}
