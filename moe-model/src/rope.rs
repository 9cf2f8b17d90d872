//! Tables of the rotary position embedding.

use moe_kernels::family::Rotation;
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};

use crate::Result;
use crate::cx::MicroBatch;

/// Cosines and sines, `[positions, head_dim / 2]`, of the angles `position · θ^(−2j/d)`, worked out in f64 and rounded
/// once (arXiv 2104.09864).
#[derive(Debug)]
pub struct RopeTable<T: Float, D: Device> {
    cos: Tensor<T::Acc, D>,
    sin: Tensor<T::Acc, D>,
    head_dim: usize,
}

impl<T: Float, D: Device> Clone for RopeTable<T, D> {
    fn clone(&self) -> Self {
        RopeTable { cos: self.cos.clone(), sin: self.sin.clone(), head_dim: self.head_dim }
    }
}

impl<T: Float, D: Backend<T>> RopeTable<T, D> {
    /// For positions `0..positions`.
    pub fn new(device: &D, positions: usize, head_dim: usize, theta: f64) -> Result<Self> {
        let half = head_dim / 2;
        let angles: Vec<f64> = (0..positions)
            .flat_map(|position| {
                (0..half).map(move |j| position as f64 * theta.powf(-2.0 * j as f64 / head_dim as f64))
            })
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().map(|&a| f(a)).collect();
            Tensor::from_f64(device, positions, half, &values)
        };
        Ok(RopeTable { cos: table(f64::cos)?, sin: table(f64::sin)?, head_dim })
    }

    /// `y = rotated x`; `x, y: [tokens, heads · head_dim]`.
    pub fn apply(
        &self,
        device: &D,
        y: ViewMut<'_, T, D>,
        x: View<'_, T, D>,
        batch: &MicroBatch<T, D>,
        rotation: Rotation,
    ) -> Result<()> {
        let positions = batch.positions.view();
        device.rope(y, x, self.cos.view(), self.sin.view(), positions, self.head_dim, rotation)?;
        Ok(())
    }
}
