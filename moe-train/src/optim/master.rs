//! Master weights: what weights of a type that is not its own accumulator are rounded from.
//!
//! A master weight is nowhere kept whole: a weight in bf16 and the low 16 bits of its master weight are the latter's bits
//! ([`Float::split`]). Weights of the accumulation type are their own master weights.

use std::ops::Range;

use moe_kernels::{Device, Float, Tensor, ViewMut};

use super::state::to_bytes;
use crate::Result;

/// The low 16 bits of the master weights of a rank's slice of a bucket; none where weights are their own master weights.
#[derive(Debug)]
pub(super) struct Remainder<D: Device>(Option<Tensor<u16, D>>);

impl<D: Device> Remainder<D> {
    /// Of `n` weights in `T` that are, as they are, their master weights.
    pub fn zeros<T: Float>(device: &D, n: usize) -> Result<Self> {
        Ok(Remainder(if T::is_acc() { None } else { Some(Tensor::zeros(device, 1, n)?) }))
    }

    /// To update.
    pub fn view_mut(&mut self) -> Result<Option<ViewMut<'_, u16, D>>> {
        Ok(self.0.as_mut().map(Tensor::view_mut).transpose()?)
    }

    /// The master weights of `weights`, sharing memory.
    pub fn with<T: Float>(&self, weights: Tensor<T, D>) -> Masters<T, D> {
        Masters { weights, remainder: self.0.clone() }
    }

    /// Keeps the low 16 bits of `masters`, from the slice's `at`-th on, and returns the weights that they are rounded to.
    pub fn write<T: Float>(&mut self, device: &D, at: usize, masters: &[T::Acc]) -> Result<Vec<T>> {
        if let Some(remainder) = &mut self.0 {
            let low: Vec<u16> = masters.iter().map(|&master| T::split(master).1).collect();
            remainder.upload(device, at, &low)?;
        }
        Ok(masters.iter().map(|&master| T::split(master).0).collect())
    }
}

/// The master weights of a slice, `[1, slice]`.
#[derive(Debug, Clone)]
pub(super) struct Masters<T: Float, D: Device> {
    weights: Tensor<T, D>,
    /// Their low 16 bits; none where weights are their own master weights.
    remainder: Option<Tensor<u16, D>>,
}

impl<T: Float, D: Device> Masters<T, D> {
    /// Some of them, on the host.
    fn to_vec(&self, range: Range<usize>, device: &D) -> Result<Vec<T::Acc>> {
        let weights = self.weights.columns(range.clone())?.to_vec(device)?.into_iter();
        Ok(match &self.remainder {
            None => weights.map(T::to_acc).collect(),
            Some(remainder) => {
                let remainder = remainder.columns(range)?.to_vec(device)?;
                weights.zip(remainder).map(|(weight, remainder)| weight.join(remainder)).collect()
            }
        })
    }

    /// Some of them, little-endian, in the accumulation type.
    pub fn to_bytes(&self, range: Range<usize>, device: &D) -> Result<Vec<u8>> {
        match &self.remainder {
            None => to_bytes(&self.weights, range, device),
            Some(_) => Ok(bytemuck::cast_slice(&self.to_vec(range, device)?).to_vec()),
        }
    }

    /// All of them (exact).
    pub fn to_f64(&self, device: &D) -> Result<Vec<f64>> {
        let [_, n] = self.weights.shape();
        Ok(self.to_vec(0..n, device)?.into_iter().map(Float::to_f64).collect())
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::{Cpu, bf16};

    use super::*;

    #[test]
    fn masters_are_given_back_as_they_were_written() {
        let cpu = Cpu::poisoned(1);
        let masters: Vec<f32> = (0..100).map(|n| f32::from_bits(0x3f80_7ff0 + n * 0x0fff)).collect();
        let mut remainder = Remainder::zeros::<bf16>(&cpu, 100).unwrap();
        let mut weights = Tensor::<bf16, Cpu>::zeros(&cpu, 1, 100).unwrap();
        assert_eq!(remainder.with(weights.clone()).to_f64(&cpu).unwrap(), [0.0; 100]);
        for at in [60, 0] {
            let some = &masters[at..if at == 0 { 60 } else { 100 }];
            let rounded: Vec<bf16> = remainder.write(&cpu, at, some).unwrap();
            weights.upload(&cpu, at, &rounded).unwrap();
        }
        let kept = remainder.with(weights);
        assert_eq!(kept.to_bytes(7..93, &cpu).unwrap(), bytemuck::cast_slice::<_, u8>(&masters[7..93]));
        assert!(kept.to_f64(&cpu).unwrap().into_iter().eq(masters.iter().copied().map(f64::from)));
    }
}
