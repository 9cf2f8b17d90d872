//! AdamW on this rank's slices.

use std::ops::Range;

use moe_kernels::family::{AdamW, Optim};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore};

use super::groups::{ParamGroups, TensorHyper};
use super::shard::sliced_parts;
use super::state::{Kept, Moment, MomentDTypes, Shard};
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

/// Master weights and moments of one rank, cut over the groups in which gradients are partial. Weights of the accumulation
/// type are their own master; they are in the parameter store.
#[derive(Debug)]
pub struct Optimizer<T: Float, D: Device> {
    hyper: Hyper,
    shards: Vec<Shard<T::Acc, D>>,
    runs: Vec<Vec<(Range<usize>, TensorHyper)>>,
    updates: u64,
}

impl<T: Float, D: Backend<T>> Optimizer<T, D> {
    /// Starting state: master weights as the weights start from `seed`, moments zero.
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
        let shards =
            params.buckets().iter().map(|bucket| Shard::start::<T>(bucket, seed, hyper.moments, device));
        Ok(Optimizer { hyper, shards: shards.collect::<Result<_>>()?, runs, updates: 0 })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// What is kept of this rank's slice of a bucket of `params`, sharing memory.
    pub fn kept(&self, params: &ParamStore<T, D>, bucket: usize, moment: Moment) -> Result<Kept<T::Acc, D>> {
        let Shard { master, m, v } = &self.shards[bucket];
        Ok(match (moment, master) {
            (Moment::Master, Some(master)) => Kept::Acc(master.clone()),
            (Moment::Master, None) => Kept::Acc(params.slice(bucket)?.into_acc()?),
            (Moment::First, _) => m.clone(),
            (Moment::Second, _) => v.clone(),
        })
    }

    /// One update from this rank's slices of the reduced gradients, bucket by bucket, in the order in which the next step
    /// needs them; starts to gather the weights of each and does not wait. A gradient's memory is free after its update.
    /// Collective.
    pub fn update(
        &mut self,
        cx: &mut Cx<T, D>,
        grads: Vec<Tensor<T::Acc, D>>,
        lr: f64,
        grad_scale: f64,
    ) -> Result<()> {
        self.updates += 1;
        let Hyper { beta1, beta2, eps, .. } = self.hyper;
        for (bucket, ((shard, grad), runs)) in self.shards.iter_mut().zip(grads).zip(&self.runs).enumerate() {
            let mut weights = cx.params.take_slice(bucket, &cx.device)?;
            for (run, hyper) in runs.iter().filter(|(_, hyper)| !hyper.frozen) {
                let weight = weights.view_mut()?.columns(run.clone())?;
                let (weight, master) = match &mut shard.master {
                    Some(master) => (Some(weight), master.view_mut()?.columns(run.clone())?),
                    None => (None, weight.into_acc()?),
                };
                let (m, v) = (shard.m.part_mut(run.clone())?, shard.v.part_mut(run.clone())?);
                let hyper = AdamW {
                    lr: lr * hyper.lr_scale,
                    beta1,
                    beta2,
                    eps,
                    weight_decay: hyper.weight_decay,
                    step: self.updates,
                    grad_scale,
                };
                let grad = grad.view().columns(run.clone())?;
                Optim::<T>::adamw(&cx.device, weight, master, m, v, grad, &hyper)?;
            }
            cx.params.start_gather(bucket, weights, &cx.comms)?;
        }
        Ok(())
    }

    /// Makes all moments 0.
    pub(crate) fn forget(&mut self, params: &ParamStore<T, D>, device: &D) -> Result<()> {
        let dtypes = self.hyper.moments;
        for (shard, bucket) in self.shards.iter_mut().zip(params.buckets()) {
            shard.m = Kept::zeros(device, bucket.slice.len(), dtypes.exp_avg)?;
            shard.v = Kept::zeros(device, bucket.slice.len(), dtypes.exp_avg_sq)?;
        }
        Ok(())
    }

    /// Writes elements of what is kept of a bucket's slice, from the `at`-th on. Master weights become the weights with
    /// [`weights_from_master`](Self::weights_from_master).
    pub(crate) fn write(
        &mut self,
        cx: &mut Cx<T, D>,
        bucket: usize,
        moment: Moment,
        at: usize,
        elements: &[T::Acc],
    ) -> Result<()> {
        let Shard { master, m, v } = &mut self.shards[bucket];
        match (moment, master) {
            (Moment::Master, Some(master)) => Ok(master.upload(&cx.device, at, elements)?),
            (Moment::Master, None) => {
                let first = cx.params.buckets()[bucket].slice.start;
                let elements: Vec<T> = elements.iter().copied().map(T::from_acc).collect();
                Ok(cx.params.weights_mut(bucket)?.upload(&cx.device, first + at, &elements)?)
            }
            (Moment::First, _) => m.upload(&cx.device, at, elements),
            (Moment::Second, _) => v.upload(&cx.device, at, elements),
        }
    }

    /// Makes the master weights the weights, after `updates` updates, and gathers them: after a checkpoint was read.
    /// Collective.
    pub(crate) fn weights_from_master(&mut self, cx: &mut Cx<T, D>, updates: u64) -> Result<()> {
        self.updates = updates;
        for (bucket, shard) in self.shards.iter().enumerate() {
            let mut slice = cx.params.take_slice(bucket, &cx.device)?;
            if let Some(master) = &shard.master {
                cx.device.narrow(slice.view_mut()?, master.view())?;
            }
            cx.params.start_gather(bucket, slice, &cx.comms)?;
        }
        Ok(cx.params.await_all_weights()?)
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
