//! AdamW on this rank's slices.

use std::ops::Range;

use moe_kernels::family::{AdamW, AdamWRun, Optim};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore};
use moe_topology::Attention;

use super::groups::{ParamGroups, TensorHyper};
use super::shard::sliced_parts;
use super::state::{Kept, KeptMoment, Moment, MomentDTypes, Shard};
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

/// Moments of one rank and what its weights, which are in the parameter store, lack of their masters, cut over the groups in which
/// gradients are partial.
#[derive(Debug)]
pub struct Optimizer<T: Float, D: Device> {
    hyper: Hyper,
    shards: Vec<Shard<T::Acc, D>>,
    runs: Vec<Vec<AdamWRun>>,
    updates: u64,
}

impl<T: Float, D: Backend<T>> Optimizer<T, D> {
    /// For weights of `params` that are their masters; moments are 0.
    ///
    /// # Errors
    /// `groups` are not those of this model, or the device refuses.
    pub fn new(hyper: Hyper, groups: &ParamGroups, params: &ParamStore<T, D>, device: &D) -> Result<Self> {
        let runs = params.buckets().iter().map(|bucket| runs(bucket, groups)).collect::<Result<_>>()?;
        let shards = params.buckets().iter();
        let shards = shards.map(|bucket| Shard::zeros::<T>(device, bucket.slice.len(), hyper.moments));
        Ok(Optimizer { hyper, shards: shards.collect::<Result<_>>()?, runs, updates: 0 })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// What is kept of this rank's slice of a bucket of `params`, sharing memory.
    pub fn kept(&self, params: &ParamStore<T, D>, bucket: usize, moment: Moment) -> Result<Kept<T, D>> {
        let Shard { remainder, m, v } = &self.shards[bucket];
        Ok(match moment {
            Moment::Master => Kept::Masters(remainder.with(params.slice(bucket)?)),
            Moment::First => Kept::Moment(m.clone()),
            Moment::Second => Kept::Moment(v.clone()),
        })
    }

    /// One update from this rank's slices of the reduced gradients, in the order in which the next step needs them: bucket by
    /// bucket, of which each starts to gather its weights and does not wait, or, on a rank alone, all at once. A gradient's
    /// memory is free after its update. Collective.
    pub fn update(
        &mut self,
        cx: &mut Cx<T, D>,
        grads: Vec<Tensor<T::Acc, D>>,
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let Hyper { beta1, beta2, eps, .. } = self.hyper;
        let update = AdamW { lr, beta1, beta2, eps, step: self.updates, grad_scale };
        let alone = cx.comms.group(Attention::ALL)?.size() == 1;
        let at_once = if alone { grads.len().max(1) } else { 1 };
        let (mut grads, mut bucket) = (grads.into_iter(), 0);
        for (shards, runs) in self.shards.chunks_mut(at_once).zip(self.runs.chunks(at_once)) {
            let buckets = bucket..bucket + shards.len();
            let weights = buckets.clone().map(|bucket| cx.params.take_slice(bucket, &cx.device));
            let mut weights = weights.collect::<moe_model::Result<Vec<_>>>()?;
            let slices = shards.iter_mut().zip(&mut weights).zip(grads.by_ref().zip(runs));
            let slices = slices.map(|((shard, weight), (grad, runs))| shard.slice_mut(weight, grad, runs));
            Optim::<T>::adamw(&cx.device, slices.collect::<Result<_>>()?, &update)?;
            for (bucket, weights) in buckets.clone().zip(weights) {
                cx.params.start_gather(bucket, weights, &cx.comms)?;
            }
            bucket = buckets.end;
        }
        Ok(())
    }

    /// Makes all moments 0.
    pub(crate) fn forget(&mut self, params: &ParamStore<T, D>, device: &D) -> Result<()> {
        let dtypes = self.hyper.moments;
        for (shard, bucket) in self.shards.iter_mut().zip(params.buckets()) {
            shard.m = KeptMoment::zeros(device, bucket.slice.len(), dtypes.exp_avg)?;
            shard.v = KeptMoment::zeros(device, bucket.slice.len(), dtypes.exp_avg_sq)?;
        }
        Ok(())
    }

    /// Makes this rank's master weights of 0 what they are at the start, which depends on `seed` and names alone, and gathers the weights.
    /// Collective.
    pub(crate) fn start(&mut self, cx: &mut Cx<T, D>, seed: u64) -> Result<()> {
        for index in 0..self.shards.len() {
            let bucket = cx.params.buckets()[index].clone();
            let slice = bucket.slice.clone();
            bucket.initial(seed, slice.clone(), Float::from_f64, |at, masters| {
                self.write(cx, index, Moment::Master, at - slice.start, masters)
            })?;
        }
        self.gather_weights(cx, 0)
    }

    /// Writes elements of what is kept of a bucket's slice, from the `at`-th on. Other ranks have the weights of these masters with
    /// [`gather_weights`](Self::gather_weights).
    pub(crate) fn write(
        &mut self,
        cx: &mut Cx<T, D>,
        bucket: usize,
        moment: Moment,
        at: usize,
        elements: &[T::Acc],
    ) -> Result<()> {
        let Shard { remainder, m, v } = &mut self.shards[bucket];
        match moment {
            Moment::Master => {
                let first = cx.params.buckets()[bucket].slice.start;
                let weights: Vec<T> = remainder.write(&cx.device, at, elements)?;
                Ok(cx.params.weights_mut(bucket)?.upload(&cx.device, first + at, &weights)?)
            }
            Moment::First => m.upload(&cx.device, at, elements),
            Moment::Second => v.upload(&cx.device, at, elements),
        }
    }

    /// Gathers the weights from the slices that all ranks wrote, as they are after `updates` updates. Collective.
    pub(crate) fn gather_weights(&mut self, cx: &mut Cx<T, D>, updates: u64) -> Result<()> {
        self.updates = updates;
        for bucket in 0..self.shards.len() {
            let slice = cx.params.take_slice(bucket, &cx.device)?;
            cx.params.start_gather(bucket, slice, &cx.comms)?;
        }
        Ok(cx.params.await_all_weights()?)
    }
}

/// The slice of a bucket as runs of elements that are updated alike, counted from the slice's start; frozen ones are left out. Padding
/// joins the run before it: its gradient is 0 and its weight is 0, so nothing moves it.
fn runs(bucket: &BucketLayout, groups: &ParamGroups) -> Result<Vec<AdamWRun>> {
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
    // A slice of padding alone has no run: its weights are its master weights, 0.
    if let Some((run, _)) = runs.last_mut() {
        run.end = bucket.slice.len();
    }
    let trained = runs.into_iter().filter(|(_, hyper)| !hyper.frozen);
    let run = |(elements, TensorHyper { lr_scale, weight_decay, .. })| AdamWRun {
        elements,
        lr_scale,
        weight_decay,
    };
    Ok(trained.map(run).collect())
}
