use crate::{Device, Float, Result, View, ViewMut};

/// Root-mean-square normalisation, `y = x · rsqrt(mean(x²) + eps) · w` (arXiv 1910.07467).
pub trait Norm<T: Float>: Device {
    /// `y, x: [n, H]`, `w: [1, H]`; `rstd: [1, n]` receives `rsqrt(mean(x²) + eps)` for backward.
    fn rms_norm(
        &self,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        eps: f64,
    ) -> Result<()>;

    /// Overwrites `dx: [n, H]`, adds to `dw: [1, H]` in ascending rows.
    fn rms_norm_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
    ) -> Result<()>;
}
