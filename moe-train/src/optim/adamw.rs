//! AdamW on this rank's slices.

use std::ops::Range;

use moe_kernels::family::{AdamW, AdamWRun, Optim};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore};
use moe_topology::Attention;

use super::groups::{ParamGroups, TensorHyper};
use super::shard::sliced_parts;
use super::state::{Kept, KeptMoment, Moment, MomentDTypes, Shard, Slice};
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

/// What one rank keeps beside the weights of its parameter store: moments and, of weights in bf16, the low 16 bits of the master
/// weights; cut over the groups in which gradients are partial.
#[derive(Debug)]
pub struct Optimizer<T: Float, D: Device> {
    hyper: Hyper,
    shards: Vec<Shard<T::Acc, D>>,
    runs: Vec<Vec<AdamWRun>>,
    updates: u64,
}

impl<T: Float, D: Device> Optimizer<T, D> {
    /// As a new run starts: master weights are drawn in `T::Acc`, from `seed` and names alone, and `cx.params` has the weights that
    /// they are rounded to, whatever it had before; moments are 0. Collective.
    ///
    /// # Errors
    /// `groups` are not those of this model, weights are still being gathered, or the device or a communicator refuses.
    pub fn drawn(hyper: Hyper, groups: &ParamGroups, cx: &mut Cx<T, D>, seed: u64) -> Result<Self> {
        let mut optimizer = Self::of_weights(hyper, groups, cx)?;
        for index in 0..optimizer.shards.len() {
            let bucket = cx.params.buckets()[index].clone();
            let slice = bucket.slice.clone();
            // Elements that start at 0 are not drawn.
            cx.params.weights_mut(index)?.view_mut()?.columns(slice.clone())?.zero(&cx.device)?;
            bucket.initial(seed, slice.clone(), Float::from_f64, |at, masters| {
                optimizer.write(cx, index, Moment::Master, at - slice.start, masters)
            })?;
        }
        optimizer.gather_weights(cx, 0)?;
        Ok(optimizer)
    }

    /// For the weights that `cx.params` has, as they are: a master weight is its weight, with no more bits; moments are 0. Of weights
    /// in bf16 that were drawn ([`ParamStore::new`]) that is not the start of a run, which [`drawn`](Self::drawn) is.
    ///
    /// # Errors
    /// `groups` are not those of this model, or the device refuses.
    pub fn of_weights(hyper: Hyper, groups: &ParamGroups, cx: &Cx<T, D>) -> Result<Self> {
        let buckets = cx.params.buckets();
        let runs = buckets.iter().map(|bucket| runs(bucket, groups)).collect::<Result<_>>()?;
        let shard = |bucket: &BucketLayout| Shard::zeros::<T>(&cx.device, bucket.slice.len(), hyper.moments);
        let shards = buckets.iter().map(shard).collect::<Result<_>>()?;
        Ok(Optimizer { hyper, shards, runs, updates: 0 })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// What is kept of this rank's slice of a bucket of `params`, sharing memory.
    ///
    /// # Errors
    /// An update failed before it gave the bucket's weights back.
    pub fn kept(&self, params: &ParamStore<T, D>, bucket: usize, moment: Moment) -> Result<Kept<T, D>> {
        let Shard { remainder, m, v } = &self.shards[bucket];
        Ok(Kept(match moment {
            Moment::Master => Slice::Masters(remainder.with(params.slice(bucket)?)),
            Moment::First => Slice::Moment(m.clone()),
            Moment::Second => Slice::Moment(v.clone()),
        }))
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

impl<T: Float, D: Backend<T>> Optimizer<T, D> {
    /// One update from this rank's slices of the reduced gradients, in the order in which the next step needs them: bucket by
    /// bucket, of which each starts to gather its weights and does not wait, or, on a rank alone, all at once. A gradient's
    /// memory is free after its update. Collective.
    ///
    /// # Errors
    /// The device or a communicator refuses; weights and moments are then of no use.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use moe_comm::{Comms, ThreadWorld, World};
    use moe_kernels::family::RotaryPairs;
    use moe_kernels::{Cpu, bf16};
    use moe_model::config::RotaryFrequencies;
    use moe_model::params::{Init, Logical, Name, ParamLayoutBuilder, Placed};
    use moe_model::{Objective, RopeTable};
    use moe_topology::{Folding, Mapping, Owner, Placement};

    use super::super::TensorName;
    use super::*;
    use crate::Error;

    const SEED: u64 = 3;
    const HYPER: Hyper = Hyper {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        moments: MomentDTypes { exp_avg: None, exp_avg_sq: None },
    };

    type Start<T> = fn(&ParamGroups, &mut Cx<T, Cpu>) -> Result<Optimizer<T, Cpu>>;

    /// The master weights of the slice of each rank of TP2 × DP2, and all of its weights, which were drawn before `start`.
    fn ranks<T: Float>(start: Start<T>) -> Vec<[Vec<f64>; 2]> {
        ThreadWorld::run(4, Duration::from_secs(60), move |world| {
            let device = Cpu::poisoned(1);
            let folding = Folding::new(Mapping { world_size: 4, tp: 2, ..Mapping::default() })?;
            let mut layout = ParamLayoutBuilder::new(&folding, world.rank());
            let mut tensors = Vec::new();
            for (name, dims, shards, init) in [
                ("matrix", &[6, 50][..], &[(0, Attention::TP)][..], Init::Normal(0.02)),
                ("norm", &[50], &[], Init::Ones),
                ("bias", &[50], &[], Init::Zeros),
            ] {
                let placement = Placement::new(dims, shards, Attention::DP, Owner::Stage(0))?;
                let (name, vector) = (name.to_owned(), dims.len() == 1);
                tensors.push(TensorName { name: name.clone(), vector });
                let placement = Placed::Attention(placement);
                layout.add(&[Logical { name: Name::One(name), placement, init }])?;
            }
            let params = ParamStore::<T, Cpu>::new(layout.build(), SEED, &device)?;
            let comms = Comms::builder().attention(Attention::DP).build(&world, &device, &folding)?;
            let frequencies = RotaryFrequencies { per_position: vec![1.0], attention_factor: 1.0 };
            let rope = RopeTable::new(&device, 1, &frequencies, RotaryPairs::Halves)?;
            let objective = Objective { micro_batches: 1, sequences: 1, tokens: 1 };
            let mut cx = Cx::new(device, comms, params, rope, objective);
            let optimizer = start(&ParamGroups::new(&[], HYPER.weight_decay, &tensors)?, &mut cx)?;
            cx.params.await_all_weights()?;
            assert_eq!(cx.params.buckets().len(), 1);
            let masters = optimizer.kept(&cx.params, 0, Moment::Master)?.to_f64(&cx.device)?;
            Ok::<_, Error>([masters, cx.params.weights(0)?.to_f64(&cx.device)?])
        })
        .unwrap_or_else(|error| panic!("{error}"))
    }

    fn drawn<T: Float>(groups: &ParamGroups, cx: &mut Cx<T, Cpu>) -> Result<Optimizer<T, Cpu>> {
        let other = vec![T::from_f64(7.0); cx.params.buckets()[0].len];
        cx.params.weights_mut(0)?.upload(&cx.device, 0, &other)?;
        Optimizer::drawn(HYPER, groups, cx, SEED)
    }

    fn of_weights<T: Float>(groups: &ParamGroups, cx: &mut Cx<T, Cpu>) -> Result<Optimizer<T, Cpu>> {
        Optimizer::of_weights(HYPER, groups, cx)
    }

    #[test]
    fn masters_in_bf16_are_drawn_as_those_in_f32_and_weights_are_rounded_from_them() {
        let rounded = |masters: &[f64]| -> Vec<f64> {
            masters.iter().map(|&master| bf16::split(master as f32).0.to_f64()).collect()
        };
        let (half, single) = (ranks::<bf16>(drawn), ranks::<f32>(drawn));
        let stores = ranks::<bf16>(of_weights).into_iter().zip(ranks::<f32>(of_weights));
        for ((half, single), (half_store, single_store)) in half.iter().zip(&single).zip(stores) {
            let [[masters, weights], [single_masters, single_weights]] = [half, single];
            assert_eq!(masters, single_masters);
            assert_eq!(*weights, rounded(single_weights));
            assert_ne!(weights, single_weights);
            // The stores had the same weights before.
            assert_eq!(*single, single_store);
            let [store_masters, store_weights] = half_store;
            assert_eq!(store_weights, *weights);
            assert_eq!(store_masters, rounded(masters));
        }
        assert!(half[0] != half[1] && half[0][1] == half[2][1], "ranks of DP have the same block");
    }
}
