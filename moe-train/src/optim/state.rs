//! What the optimizer keeps of a rank's slice of a bucket.

use std::ops::Range;

use moe_kernels::family::MomentMut;
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

/// A moment of a slice, `[1, slice]`.
#[derive(Debug)]
pub(super) enum Kept<A: Float, D: Device> {
    Acc(Tensor<A, D>),
    Bf16(Tensor<bf16, D>),
}

impl<A: Float, D: Device> Kept<A, D> {
    fn new(device: &D, elements: &[A], dtype: Option<MomentDType>) -> Result<Self> {
        let n = elements.len();
        Ok(match dtype {
            None => Kept::Acc(Tensor::from_slice(device, 1, n, elements)?),
            Some(MomentDType::Bf16) => {
                let rounded: Vec<bf16> = elements.iter().map(|x| Float::from_f64(x.to_f64())).collect();
                Kept::Bf16(Tensor::from_slice(device, 1, n, &rounded)?)
            }
        })
    }

    /// Some of the elements, to update.
    pub fn part_mut(&mut self, range: Range<usize>) -> Result<MomentMut<'_, A, D>> {
        Ok(match self {
            Kept::Acc(own) => MomentMut::Acc(own.view_mut()?.columns(range)?),
            Kept::Bf16(own) => MomentMut::Bf16(own.view_mut()?.columns(range)?),
        })
    }

    fn to_bytes(&self, device: &D) -> Result<(DType, Vec<u8>)> {
        match self {
            Kept::Acc(own) => to_bytes(own, device),
            Kept::Bf16(own) => to_bytes(own, device),
        }
    }

    fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        Ok(match self {
            Kept::Acc(own) => own.to_f64(device)?,
            Kept::Bf16(own) => own.to_f64(device)?,
        })
    }
}

fn to_bytes<E: Element, D: Device>(tensor: &Tensor<E, D>, device: &D) -> Result<(DType, Vec<u8>)> {
    Ok((E::DTYPE, bytemuck::cast_slice(&tensor.to_vec(device)?).to_vec()))
}

/// Master weights and moments of this rank's slice of one bucket.
#[derive(Debug)]
pub struct Shard<A: Float, D: Device> {
    pub(super) master: Tensor<A, D>,
    pub(super) m: Kept<A, D>,
    pub(super) v: Kept<A, D>,
}

impl<A: Float, D: Device> Shard<A, D> {
    /// From the slice's elements of each kind, in the order of [`Moment::ALL`].
    pub(crate) fn new(device: &D, [master, m, v]: &[Vec<A>; 3], dtypes: MomentDTypes) -> Result<Self> {
        Ok(Shard {
            master: Tensor::from_slice(device, 1, master.len(), master)?,
            m: Kept::new(device, m, dtypes.exp_avg)?,
            v: Kept::new(device, v, dtypes.exp_avg_sq)?,
        })
    }

    /// The starting values of `bucket`'s slice, moments zero.
    pub(super) fn start(bucket: &BucketLayout, seed: u64, dtypes: MomentDTypes, device: &D) -> Result<Self> {
        let master = bucket.initial(seed, bucket.slice.clone()).into_iter().map(A::from_f64).collect();
        let zeros = || vec![A::ZERO; bucket.slice.len()];
        Shard::new(device, &[master, zeros(), zeros()], dtypes)
    }

    /// The elements of one kind, little-endian, in the type in which they are kept.
    pub(crate) fn to_bytes(&self, moment: Moment, device: &D) -> Result<(DType, Vec<u8>)> {
        match moment {
            Moment::Master => to_bytes(&self.master, device),
            Moment::First => self.m.to_bytes(device),
            Moment::Second => self.v.to_bytes(device),
        }
    }

    /// The elements of one kind (exact), `[1, slice]`.
    pub fn to_f64(&self, moment: Moment, device: &D) -> Result<Vec<f64>> {
        match moment {
            Moment::Master => Ok(self.master.to_f64(device)?),
            Moment::First => self.m.to_f64(device),
            Moment::Second => self.v.to_f64(device),
        }
    }
}
