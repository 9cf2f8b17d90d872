//! AdamW on this rank's slices.

use std::ops::Range;

use moe_kernels::family::{AdamW, Optim};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore};

use super::groups::{ParamGroups, TensorHyper};
use super::shard::{sliced_parts, weights_from_master};
use super::state::{MomentDTypes, Shard};
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
    /// Decoupled weight decay of matrices, unless their group has its own; vectors are not decayed.
    pub weight_decay: f64,
    /// In which types moments are kept.
    pub moments: MomentDTypes,
}

/// Master weights and moments of one rank, cut over the groups in which gradients are partial.
#[derive(Debug)]
pub struct Optimizer<T: Float, D: Device> {
    hyper: Hyper,
    shards: Vec<Shard<T::Acc, D>>,
    runs: Vec<Vec<(Range<usize>, TensorHyper)>>,
    updates: u64,
}

impl<T: Float, D: Backend<T>> Optimizer<T, D> {
    /// Starting state: master weights as the weights start, moments zero.
    ///
    /// # Errors
    /// `groups` are not those of this model, or the device refuses.
    pub fn new(
        hyper: Hyper,
        groups: &ParamGroups,
        params: &ParamStore<T, D>,
        seed: u64,
        device: &D,
    ) -> Result<Self> {
        let runs = params.buckets().iter().map(|bucket| runs(bucket, groups)).collect::<Result<_>>()?;
        let shards = params.buckets().iter().map(|bucket| Shard::start(bucket, seed, hyper.moments, device));
        Ok(Optimizer { hyper, shards: shards.collect::<Result<_>>()?, runs, updates: 0 })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The slices, in bucket order.
    pub fn shards(&self) -> &[Shard<T::Acc, D>] {
        &self.shards
    }

    /// One update from this rank's slices of the reduced gradients, bucket by bucket, in the order in which the next step
    /// needs them; starts to gather the weights of each and does not wait. Collective.
    pub fn update(
        &mut self,
        cx: &mut Cx<T, D>,
        grads: &[Tensor<T::Acc, D>],
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let Hyper { beta1, beta2, eps, .. } = self.hyper;
        for (bucket, ((shard, grad), runs)) in self.shards.iter_mut().zip(grads).zip(&self.runs).enumerate() {
            let mut weights = Tensor::uninit(&cx.device, 1, grad.shape()[1])?;
            for (run, TensorHyper { lr_scale, weight_decay, frozen }) in runs {
                if *frozen {
                    let master = shard.master.view().columns(run.clone())?;
                    cx.device.narrow(weights.view_mut()?.columns(run.clone())?, master)?;
                    continue;
                }
                let hyper = AdamW {
                    lr: lr * lr_scale,
                    beta1,
                    beta2,
                    eps,
                    weight_decay: *weight_decay,
                    step: self.updates,
                    grad_scale,
                };
                Optim::<T>::adamw(
                    &cx.device,
                    weights.view_mut()?.columns(run.clone())?,
                    shard.master.view_mut()?.columns(run.clone())?,
                    shard.m.part_mut(run.clone())?,
                    shard.v.part_mut(run.clone())?,
                    grad.view().columns(run.clone())?,
                    &hyper,
                )?;
            }
            cx.params.start_gather(bucket, &weights, &cx.comms)?;
        }
        Ok(())
    }

    /// Takes over a checkpoint's state and makes its master weights the weights. Collective.
    pub fn restore(&mut self, cx: &mut Cx<T, D>, shards: Vec<Shard<T::Acc, D>>, updates: u64) -> Result<()> {
        self.shards = shards;
        self.updates = updates;
        weights_from_master(cx, &self.shards)
    }
}

/// The slice of a bucket as runs of elements that are updated alike, counted from the slice's start. Padding joins the run
/// before it: its gradient is 0 and its weight is 0, so nothing moves it.
fn runs(bucket: &BucketLayout, groups: &ParamGroups) -> Result<Vec<(Range<usize>, TensorHyper)>> {
    let mut runs: Vec<(Range<usize>, TensorHyper)> = Vec::new();
    for (part, range) in sliced_parts(bucket) {
        let end = range.end - bucket.slice.start;
        let hyper = groups.of(&part.name)?;
        match runs.last_mut() {
            Some((run, last)) if *last == hyper => run.end = end,
            Some((run, _)) => {
                let start = run.end;
                runs.push((start..end, hyper));
            }
            None => runs.push((0..end, hyper)),
        }
    }
    match runs.last_mut() {
        Some((run, _)) => run.end = bucket.slice.len(),
        // Padding alone: its weights are its master weights, 0.
        None if !bucket.slice.is_empty() => {
            runs.push((
                0..bucket.slice.len(),
                TensorHyper { lr_scale: 1.0, weight_decay: 0.0, frozen: true },
            ));
        }
        None => {}
    }
    Ok(runs)
}
