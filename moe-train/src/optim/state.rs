//! What the optimizer keeps of a rank's slice of a bucket.

use std::ops::Range;

use moe_kernels::family::{AdamWRun, AdamWSlice, MomentMut};
use moe_kernels::{DType, Device, Element, Float, Tensor, bf16};
use moe_model::params::BucketLayout;
use serde::{Deserialize, Serialize};

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

/// What is kept of a slice, `[1, slice]`, in the type in which it is kept.
#[derive(Debug, Clone)]
pub enum Kept<A: Float, D: Device> {
    /// In the accumulation type.
    Acc(Tensor<A, D>),
    /// A moment in bf16.
    Bf16(Tensor<bf16, D>),
}

impl<A: Float, D: Device> Kept<A, D> {
    /// Zeros, which take memory on the host as they are first written.
    pub(super) fn zeros(device: &D, n: usize, dtype: Option<MomentDType>) -> Result<Self> {
        Ok(match dtype {
            None => Kept::Acc(Tensor::zeros(device, 1, n)?),
            Some(MomentDType::Bf16) => Kept::Bf16(Tensor::zeros(device, 1, n)?),
        })
    }

    /// To update.
    pub(super) fn moment_mut(&mut self) -> Result<MomentMut<'_, A, D>> {
        Ok(match self {
            Kept::Acc(own) => MomentMut::Acc(own.view_mut()?),
            Kept::Bf16(own) => MomentMut::Bf16(own.view_mut()?),
        })
    }

    /// Writes elements from the `at`-th on, rounded if they are kept in bf16.
    pub(crate) fn upload(&mut self, device: &D, at: usize, elements: &[A]) -> Result<()> {
        match self {
            Kept::Acc(own) => own.upload(device, at, elements)?,
            Kept::Bf16(own) => {
                let rounded: Vec<bf16> = elements.iter().map(|x| Float::from_f64(x.to_f64())).collect();
                own.upload(device, at, &rounded)?;
            }
        }
        Ok(())
    }

    /// The type in which it is kept.
    pub fn dtype(&self) -> DType {
        match self {
            Kept::Acc(_) => A::DTYPE,
            Kept::Bf16(_) => DType::Bf16,
        }
    }

    /// Some of the elements, little-endian, in that type.
    pub(crate) fn to_bytes(&self, range: Range<usize>, device: &D) -> Result<Vec<u8>> {
        match self {
            Kept::Acc(own) => to_bytes(own, range, device),
            Kept::Bf16(own) => to_bytes(own, range, device),
        }
    }

    /// All elements (exact).
    pub fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        Ok(match self {
            Kept::Acc(own) => own.to_f64(device)?,
            Kept::Bf16(own) => own.to_f64(device)?,
        })
    }
}

fn to_bytes<E: Element, D: Device>(
    tensor: &Tensor<E, D>,
    range: Range<usize>,
    device: &D,
) -> Result<Vec<u8>> {
    let part = tensor.columns(range)?;
    let mut bytes = vec![0; part.byte_range().len()];
    device.download(part.buf(), part.byte_range().start, &mut bytes)?;
    Ok(bytes)
}

/// What is kept beside the weights of this rank's slice of one bucket.
#[derive(Debug)]
pub(super) struct Shard<A: Float, D: Device> {
    /// The master weights. None where the weights are of the accumulation type: they are their own master.
    pub master: Option<Tensor<A, D>>,
    pub m: Kept<A, D>,
    pub v: Kept<A, D>,
}

impl<A: Float, D: Device> Shard<A, D> {
    /// With the weights of the slice, which are their own master if there is no other, and its gradient.
    pub fn slice_mut<'a, T: Float<Acc = A>>(
        &'a mut self,
        weights: &'a mut Tensor<T, D>,
        grad: Tensor<A, D>,
        runs: &'a [AdamWRun],
    ) -> Result<AdamWSlice<'a, T, D>> {
        let weights = weights.view_mut()?;
        let (weight, master) = match &mut self.master {
            Some(master) => (Some(weights), master.view_mut()?),
            None => (None, weights.into_acc()?),
        };
        Ok(AdamWSlice { weight, master, m: self.m.moment_mut()?, v: self.v.moment_mut()?, grad, runs })
    }

    /// For weights in `T` as they start from `seed`; moments are 0.
    pub fn start<T: Float<Acc = A>>(
        bucket: &BucketLayout,
        seed: u64,
        dtypes: MomentDTypes,
        device: &D,
    ) -> Result<Self> {
        let (slice, n) = (bucket.slice.clone(), bucket.slice.len());
        let mut master = if T::is_acc() { None } else { Some(Tensor::zeros(device, 1, n)?) };
        if let Some(master) = &mut master {
            bucket.initial(seed, slice.clone(), A::from_f64, |at, values| {
                master.upload(device, at - slice.start, values)
            })?;
        }
        let m = Kept::zeros(device, n, dtypes.exp_avg)?;
        Ok(Shard { master, m, v: Kept::zeros(device, n, dtypes.exp_avg_sq)? })
    }
}
