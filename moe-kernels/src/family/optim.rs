use half::bf16;

use crate::{Device, Float, Result, View, ViewMut};

/// One AdamW update (arXiv 1711.05101), all factors of the step worked out.
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
    /// Decoupled weight decay λ.
    pub weight_decay: f64,
    /// Number of this update, from 1 (bias correction).
    pub step: u64,
    /// Factor on the gradient (clipping).
    pub grad_scale: f64,
}

/// A moment as it is kept between updates.
#[derive(Debug)]
pub enum MomentMut<'a, A: Float, D: Device> {
    /// In the accumulation type.
    Acc(ViewMut<'a, A, D>),
    /// Rounded to the nearest bf16, ties to even.
    Bf16(ViewMut<'a, bf16, D>),
}

impl<'a, A: Float, D: Device> From<ViewMut<'a, A, D>> for MomentMut<'a, A, D> {
    fn from(view: ViewMut<'a, A, D>) -> Self {
        MomentMut::Acc(view)
    }
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

/// Optimizer updates on flat slices.
pub trait Optim<T: Float>: Device {
    /// With `g = grad · grad_scale`: `m = β1·m + (1−β1)·g`, `v = β2·v + (1−β2)·g²`,
    /// `master −= lr · (m/(1−β1^step) / (sqrt(v/(1−β2^step)) + eps) + λ·master)`, `weight` = `master` rounded, unless the
    /// weights are their own master.
    /// All `[1, n]`. Everything is computed in `T::Acc`; a moment that is kept in bf16 is rounded after `master` was
    /// updated by its unrounded value.
    fn adamw(
        &self,
        weight: Option<ViewMut<'_, T, Self>>,
        master: ViewMut<'_, T::Acc, Self>,
        m: MomentMut<'_, T::Acc, Self>,
        v: MomentMut<'_, T::Acc, Self>,
        grad: View<'_, T::Acc, Self>,
        hyper: &AdamW,
    ) -> Result<()>;
}
