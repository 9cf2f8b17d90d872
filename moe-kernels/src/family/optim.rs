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

/// Optimizer updates on flat slices.
pub trait Optim<T: Float>: Device {
    /// With `g = grad · grad_scale`: `m = β1·m + (1−β1)·g`, `v = β2·v + (1−β2)·g²`,
    /// `master −= lr · (m/(1−β1^step) / (sqrt(v/(1−β2^step)) + eps) + λ·master)`, `weight` = `master` rounded.
    /// All `[1, n]`.
    fn adamw(
        &self,
        weight: ViewMut<'_, T, Self>,
        master: ViewMut<'_, T::Acc, Self>,
        m: ViewMut<'_, T::Acc, Self>,
        v: ViewMut<'_, T::Acc, Self>,
        grad: View<'_, T::Acc, Self>,
        hyper: &AdamW,
    ) -> Result<()>;
}
