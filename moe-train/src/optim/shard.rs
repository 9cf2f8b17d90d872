//! A rank's slice of every bucket, and the two collectives around an update.

use std::ops::Range;

use moe_kernels::family::Elementwise;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, ParamStore, Part};
use moe_topology::Attention;

use crate::Result;

/// What the optimizer keeps per element, in the accumulation type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// The master weight.
    Master,
    /// The first moment.
    First,
    /// The second moment.
    Second,
}

impl Moment {
    /// All of them, in the order in which checkpoints list them.
    pub const ALL: [Moment; 3] = [Moment::Master, Moment::First, Moment::Second];

    /// The name that checkpoints use.
    pub const fn name(self) -> &'static str {
        match self {
            Moment::Master => "param",
            Moment::First => "m",
            Moment::Second => "v",
        }
    }
}

/// Master weights and moments of this rank's slice of one bucket, `[1, slice]` each.
#[derive(Debug)]
pub struct Shard<A: Float, D: Device> {
    /// Master weights.
    pub master: Tensor<A, D>,
    /// First moments.
    pub m: Tensor<A, D>,
    /// Second moments.
    pub v: Tensor<A, D>,
}

impl<A: Float, D: Device> Shard<A, D> {
    /// The starting values of `bucket`'s slice, moments zero.
    pub fn new(bucket: &BucketLayout, seed: u64, device: &D) -> Result<Self> {
        let n = bucket.slice.len();
        let master = bucket.initial(seed, bucket.slice.clone());
        Ok(Shard {
            master: Tensor::from_f64(device, 1, n, &master)?,
            m: Tensor::zeros(device, 1, n)?,
            v: Tensor::zeros(device, 1, n)?,
        })
    }

    /// One of the three.
    pub fn moment(&self, moment: Moment) -> &Tensor<A, D> {
        match moment {
            Moment::Master => &self.master,
            Moment::First => &self.m,
            Moment::Second => &self.v,
        }
    }

    /// Replaces one of the three.
    pub fn set_moment(&mut self, moment: Moment, value: Tensor<A, D>) {
        match moment {
            Moment::Master => self.master = value,
            Moment::First => self.m = value,
            Moment::Second => self.v = value,
        }
    }
}

/// The parts of `bucket` that meet this rank's slice, each with the elements they share, counted in the bucket.
pub fn sliced_parts(bucket: &BucketLayout) -> impl Iterator<Item = (&Part, Range<usize>)> {
    bucket.parts.iter().filter_map(|part| {
        let own = part.range();
        let range = own.start.max(bucket.slice.start)..own.end.min(bucket.slice.end);
        (!range.is_empty()).then_some((part, range))
    })
}

/// Waits for the sums of every bucket's gradients over its group, starting those that have not started, adds those of tied
/// weights over the two stages that hold them, and returns this rank's slices, `[1, slice]` each. Collective.
pub fn reduce_gradients<T: Float, D: Backend<T>>(cx: &mut Cx<T, D>) -> Result<Vec<Tensor<T::Acc, D>>> {
    cx.params.start_reductions(&cx.comms)?;
    (0..cx.params.buckets().len())
        .map(|bucket| {
            let slice = cx.params.reduced(bucket)?;
            match cx.params.buckets()[bucket].tied {
                true => add_other_stage(cx, slice),
                false => Ok(slice),
            }
        })
        .collect()
}

/// Adds the slice of the other end of the pipeline, which adds this one: a sum of two is the same on both.
fn add_other_stage<T: Float, D: Backend<T>>(
    cx: &Cx<T, D>,
    slice: Tensor<T::Acc, D>,
) -> Result<Tensor<T::Acc, D>> {
    const TAG: u64 = 0; // nothing else is sent in this communicator
    let stages = cx.comms.group(Attention::PP)?;
    let other = stages.size() - 1 - stages.rank();
    let [rows, cols] = slice.shape();
    let sent = stages.send(other, TAG, &slice)?;
    let received = stages.recv(other, TAG, rows, cols)?.wait()?;
    sent.wait()?;
    let mut sum = Tensor::uninit(&cx.device, rows, cols)?;
    Elementwise::<T::Acc>::add(&cx.device, sum.view_mut()?, slice.view(), received.view())?;
    Ok(sum)
}

/// Rounds the master weights of every slice and gathers them: after a checkpoint was read. Collective.
pub fn weights_from_master<T: Float, D: Backend<T>>(
    cx: &mut Cx<T, D>,
    shards: &[Shard<T::Acc, D>],
) -> Result<()> {
    for (bucket, shard) in shards.iter().enumerate() {
        let mut slice = Tensor::uninit(&cx.device, 1, shard.master.shape()[1])?;
        cx.device.narrow(slice.view_mut()?, shard.master.view())?;
        cx.params.start_gather(bucket, &slice, &cx.comms)?;
    }
    Ok(cx.params.await_all_weights()?)
}

/// Starting state of every bucket.
pub fn shards<T: Float, D: Device>(
    params: &ParamStore<T, D>,
    seed: u64,
    device: &D,
) -> Result<Vec<Shard<T::Acc, D>>> {
    params.buckets().iter().map(|bucket| Shard::new(bucket, seed, device)).collect::<Result<_>>()
}
