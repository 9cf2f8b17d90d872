use std::ops::Range;

use half::bf16;

use crate::{Device, Float, Result, Tensor, ViewMut};

/// One AdamW update (arXiv 1711.05101), what all elements have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Number of this update, from 1 (bias correction).
    pub step: u64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// Elements of a slice that are updated alike.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWRun {
    /// Which, counted from the start of the slice.
    pub elements: Range<usize>,
    /// Factor on the learning rate.
    pub lr_scale: f64,
    /// Decoupled weight decay λ.
    pub weight_decay: f64,
}

/// A moment as it is kept between updates.
#[derive(Debug)]
pub enum MomentMut<'a, A: Float, D: Device> {
    /// In the accumulation type.
    Acc(ViewMut<'a, A, D>),
    /// Rounded to the nearest bf16, ties to even.
    Bf16(ViewMut<'a, bf16, D>),
}

impl<A: Float, D: Device> MomentMut<'_, A, D> {
    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            MomentMut::Acc(view) => view.shape(),
            MomentMut::Bf16(view) => view.shape(),
        }
    }
}

impl<'a, A: Float, D: Device> From<ViewMut<'a, A, D>> for MomentMut<'a, A, D> {
    fn from(view: ViewMut<'a, A, D>) -> Self {
        MomentMut::Acc(view)
    }
}

/// A flat slice of parameters, what is kept of it between updates, and its gradient; all `[1, n]`.
#[derive(Debug)]
pub struct AdamWSlice<'a, T: Float, D: Device> {
    /// The weights.
    pub weight: ViewMut<'a, T, D>,
    /// The low 16 bits of the master weights, as [`Float::split`] has them; none where `T` is its own accumulator.
    pub remainder: Option<ViewMut<'a, u16, D>>,
    /// The first moment.
    pub m: MomentMut<'a, T::Acc, D>,
    /// The second moment.
    pub v: MomentMut<'a, T::Acc, D>,
    /// The gradient. It is given up, so that a device that updates slices one after the other may free each.
    pub grad: Tensor<T::Acc, D>,
    /// Which elements are updated, and how: ascending, none twice. The others stay as they are.
    pub runs: &'a [AdamWRun],
}

/// Optimizer updates on flat slices.
pub trait Optim<T: Float>: Device {
    /// With `g = grad · grad_scale` and `master` what a weight and its remainder are together: `m = β1·m + (1−β1)·g`,
    /// `v = β2·v + (1−β2)·g²`, `master −= lr · lr_scale · (m/(1−β1^step) / (sqrt(v/(1−β2^step)) + eps) + λ·master)`.
    /// Everything is computed in `T::Acc`; a moment that is kept in bf16 is rounded after `master` was
    /// updated by its unrounded value.
    fn adamw(&self, slices: Vec<AdamWSlice<'_, T, Self>>, update: &AdamW) -> Result<()>;
}
