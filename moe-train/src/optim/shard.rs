//! A rank's slice of every bucket, and the reduction of its gradients.

use std::ops::Range;

use moe_comm::{Pending, Reduction};
use moe_kernels::family::Elementwise;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::Cx;
use moe_model::params::{BucketLayout, OtherCopy, Part};
use moe_topology::Attention;

use crate::Result;

/// The parts of `bucket` that meet this rank's slice, each with the elements they share, counted in the bucket.
pub fn sliced_parts(bucket: &BucketLayout) -> impl Iterator<Item = (&Part, Range<usize>)> {
    bucket.parts.iter().filter_map(|part| {
        let own = part.range();
        let range = own.start.max(bucket.slice.start)..own.end.min(bucket.slice.end);
        (!range.is_empty()).then_some((part, range))
    })
}

/// Waits for the sums of every bucket's gradients over its group, starting those that have not started, adds those of all
/// instances of the optimizer, and of tied weights those of both stages that hold them, and returns this rank's slices, `[1, slice]` each. Collective.
pub fn reduce_gradients<T: Float, D: Backend<T>>(cx: &mut Cx<T, D>) -> Result<Vec<Tensor<T::Acc, D>>> {
    cx.params.start_reductions(&cx.comms)?;
    let sums = (0..cx.params.buckets().len())
        .map(|bucket| {
            let slice = cx.params.reduced(bucket)?;
            Ok(match cx.params.buckets()[bucket].instances {
                Some(instances) => {
                    Sum::Arriving(cx.comms.keyed(instances)?.start_all_reduce(&slice, Reduction::Sum)?)
                }
                None => Sum::Here(slice),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut slices = sums
        .into_iter()
        .zip(cx.params.buckets())
        .map(|(sum, bucket)| {
            let slice = match sum {
                Sum::Here(slice) => slice,
                Sum::Arriving(pending) => pending.wait()?,
            };
            match bucket.other_copy {
                Some(OtherCopy::OtherEnd) => add_other_stage(cx, slice),
                Some(OtherCopy::Bucket(_)) | None => Ok(slice),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    for (bucket, layout) in cx.params.buckets().iter().enumerate() {
        if let Some(OtherCopy::Bucket(other)) = layout.other_copy
            && bucket < other
        {
            let both = [(bucket, other), (other, bucket)].map(|(a, b)| sum(cx, &slices[a], &slices[b]));
            let [one, two] = both;
            (slices[bucket], slices[other]) = (one?, two?);
        }
    }
    Ok(slices)
}

/// A slice of gradients, summed over one instance of the optimizer or, on its way, over all.
enum Sum<A: Float, D: Device> {
    Here(Tensor<A, D>),
    Arriving(Pending<A, D>),
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
    sum(cx, &slice, &received)
}

fn sum<T: Float, D: Backend<T>>(
    cx: &Cx<T, D>,
    a: &Tensor<T::Acc, D>,
    b: &Tensor<T::Acc, D>,
) -> Result<Tensor<T::Acc, D>> {
    let [rows, cols] = a.shape();
    let mut sum = Tensor::uninit(&cx.device, rows, cols)?;
    Elementwise::<T::Acc>::add(&cx.device, sum.view_mut()?, a.view(), b.view())?;
    Ok(sum)
}
