//! Tables of the rotary position embedding.

use moe_kernels::family::{RotaryHead, RotaryPairs, Rotation};
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};

use crate::Result;
use crate::config::ModelConfig;
use crate::cx::MicroBatch;

/// Cosines and sines, `[positions, d / 2]`, of the angles `position · θ^(−2j/d)`, worked out in f64 and rounded once (arXiv
/// 2104.09864). `d` is the part of a head that is rotated: all of it but with latent attention.
#[derive(Debug)]
pub struct RopeTable<T: Float, D: Device> {
    cos: Tensor<T::Acc, D>,
    sin: Tensor<T::Acc, D>,
    pairs: RotaryPairs,
}

impl<T: Float, D: Device> Clone for RopeTable<T, D> {
    fn clone(&self) -> Self {
        RopeTable { cos: self.cos.clone(), sin: self.sin.clone(), pairs: self.pairs }
    }
}

impl<T: Float, D: Backend<T>> RopeTable<T, D> {
    /// For positions `0..positions` and a rotated part of `dim` elements.
    pub fn new(device: &D, positions: usize, dim: usize, theta: f64, pairs: RotaryPairs) -> Result<Self> {
        let half = dim / 2;
        let angles: Vec<f64> = (0..positions)
            .flat_map(|position| {
                (0..half).map(move |j| position as f64 * theta.powf(-2.0 * j as f64 / dim as f64))
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().map(|&a| f(a)).collect();
            Tensor::from_f64(device, positions, half, &values)
        };
        Ok(RopeTable { cos: table(f64::cos)?, sin: table(f64::sin)?, pairs })
    }

    /// That of a model, for positions `0..positions`.
    pub fn of(device: &D, config: &ModelConfig, positions: usize) -> Result<Self> {
        Self::new(device, positions, config.rotary_dim(), config.rope_theta, config.rotary_pairs())
    }

    /// `y = x` with the last `d` elements of each head rotated; `x, y: [tokens, heads · head_dim]`.
    pub fn apply(
        &self,
        device: &D,
        y: ViewMut<'_, T, D>,
        x: View<'_, T, D>,
        head_dim: usize,
        batch: &MicroBatch<T, D>,
        rotation: Rotation,
    ) -> Result<()> {
        let first = head_dim.saturating_sub(2 * self.cos.shape()[1]);
        let head = RotaryHead { head_dim, first, pairs: self.pairs };
        let positions = batch.rotary_positions().view();
        device.rope(y, x, self.cos.view(), self.sin.view(), positions, head, rotation)?;
        Ok(())
    }
}
