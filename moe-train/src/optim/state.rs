//! What the optimizer keeps of a rank's slice of a bucket.

use std::ops::Range;

use moe_kernels::family::{AdamWRun, AdamWSlice, MomentMut};
use moe_kernels::{DType, Device, Element, Float, Tensor, bf16};
use serde::{Deserialize, Serialize};

use super::master::{Masters, Remainder};
use crate::Result;

/// What the optimizer keeps per element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Moment {
    /// The master weight, in the accumulation type.
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

/// A type in which a moment is kept instead of the accumulation type. It is computed in the latter either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentDType {
    /// Rounded to the nearest bf16, ties to even.
    Bf16,
}

/// The types of both moments; in the accumulation type unless given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MomentDTypes {
    /// Of the first moment.
    pub exp_avg: Option<MomentDType>,
    /// Of the second moment.
    pub exp_avg_sq: Option<MomentDType>,
}

/// A moment of a slice, `[1, slice]`, in the type in which it is kept.
#[derive(Debug, Clone)]
pub(super) enum KeptMoment<A: Float, D: Device> {
    /// In the accumulation type.
    Acc(Tensor<A, D>),
    /// In bf16.
    Bf16(Tensor<bf16, D>),
}

impl<A: Float, D: Device> KeptMoment<A, D> {
    /// Zeros, which take memory on the host as they are first written.
    pub fn zeros(device: &D, n: usize, dtype: Option<MomentDType>) -> Result<Self> {
        Ok(match dtype {
            None => KeptMoment::Acc(Tensor::zeros(device, 1, n)?),
            Some(MomentDType::Bf16) => KeptMoment::Bf16(Tensor::zeros(device, 1, n)?),
        })
    }

    /// To update.
    pub fn moment_mut(&mut self) -> Result<MomentMut<'_, A, D>> {
        Ok(match self {
            KeptMoment::Acc(own) => MomentMut::Acc(own.view_mut()?),
            KeptMoment::Bf16(own) => MomentMut::Bf16(own.view_mut()?),
        })
    }

    /// Writes elements from the `at`-th on, rounded if they are kept in bf16.
    pub fn upload(&mut self, device: &D, at: usize, elements: &[A]) -> Result<()> {
        match self {
            KeptMoment::Acc(own) => own.upload(device, at, elements)?,
            KeptMoment::Bf16(own) => {
                let rounded: Vec<bf16> = elements.iter().map(|x| Float::from_f64(x.to_f64())).collect();
                own.upload(device, at, &rounded)?;
            }
        }
        Ok(())
    }

    fn dtype(&self) -> DType {
        match self {
            KeptMoment::Acc(_) => A::DTYPE,
            KeptMoment::Bf16(_) => DType::Bf16,
        }
    }

    fn to_bytes(&self, range: Range<usize>, device: &D) -> Result<Vec<u8>> {
        match self {
            KeptMoment::Acc(own) => to_bytes(own, range, device),
            KeptMoment::Bf16(own) => to_bytes(own, range, device),
        }
    }

    fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        Ok(match self {
            KeptMoment::Acc(own) => own.to_f64(device)?,
            KeptMoment::Bf16(own) => own.to_f64(device)?,
        })
    }
}

/// The master weights of a rank's slice of a bucket, or one of their moments: [`Optimizer::kept`](super::Optimizer::kept).
#[derive(Debug, Clone)]
pub struct Kept<T: Float, D: Device>(pub(super) Slice<T, D>);

#[derive(Debug, Clone)]
pub(super) enum Slice<T: Float, D: Device> {
    Masters(Masters<T, D>),
    Moment(KeptMoment<T::Acc, D>),
}

impl<T: Float, D: Device> Kept<T, D> {
    /// The type of what is kept.
    pub fn dtype(&self) -> DType {
        match &self.0 {
            Slice::Masters(_) => T::Acc::DTYPE,
            Slice::Moment(moment) => moment.dtype(),
        }
    }

    /// Some of the elements, little-endian, in that type.
    pub(crate) fn to_bytes(&self, range: Range<usize>, device: &D) -> Result<Vec<u8>> {
        match &self.0 {
            Slice::Masters(masters) => masters.to_bytes(range, device),
            Slice::Moment(moment) => moment.to_bytes(range, device),
        }
    }

    /// All elements (exact), on the host.
    ///
    /// # Errors
    /// The device refuses.
    pub fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        match &self.0 {
            Slice::Masters(masters) => masters.to_f64(device),
            Slice::Moment(moment) => moment.to_f64(device),
        }
    }
}

pub(super) fn to_bytes<E: Element, D: Device>(
    tensor: &Tensor<E, D>,
    range: Range<usize>,
    device: &D,
) -> Result<Vec<u8>> {
    let part = tensor.columns(range)?;
    let mut bytes = vec![0; part.byte_range().len()];
    device.download(part.buf(), part.byte_range().start, &mut bytes)?;
    Ok(bytes)
}

/// What is kept beside the weights of a rank's slice of one bucket.
#[derive(Debug)]
pub(super) struct Shard<A: Float, D: Device> {
    pub remainder: Remainder<D>,
    pub m: KeptMoment<A, D>,
    pub v: KeptMoment<A, D>,
}

impl<A: Float, D: Device> Shard<A, D> {
    /// Of `n` weights in `T` that are their masters; moments are 0.
    pub fn zeros<T: Float<Acc = A>>(device: &D, n: usize, dtypes: MomentDTypes) -> Result<Self> {
        Ok(Shard {
            remainder: Remainder::zeros::<T>(device, n)?,
            m: KeptMoment::zeros(device, n, dtypes.exp_avg)?,
            v: KeptMoment::zeros(device, n, dtypes.exp_avg_sq)?,
        })
    }

    /// With the weights of the slice and its gradient.
    pub fn slice_mut<'a, T: Float<Acc = A>>(
        &'a mut self,
        weights: &'a mut Tensor<T, D>,
        grad: Tensor<A, D>,
        runs: &'a [AdamWRun],
    ) -> Result<AdamWSlice<'a, T, D>> {
        let (weight, remainder) = (weights.view_mut()?, self.remainder.view_mut()?);
        Ok(AdamWSlice { weight, remainder, m: self.m.moment_mut()?, v: self.v.moment_mut()?, grad, runs })
    }
}
