use super::Elementwise;
use crate::{Device, Float, Result, View, ViewMut};

/// Root-mean-square normalisation, `y = x · rsqrt(mean(x²) + eps) · w` (arXiv 1910.07467).
///
/// Where the elements of a row are spread over ranks, each makes the [sums](Self::rms_norm_sums) of its own, these are added
/// over the ranks, and each goes on with its [part](Self::rms_norm_part); backward does the same.
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

    /// `sum = x + r`, and [`rms_norm`](Self::rms_norm) of that: what a sublayer adds to the residual stream, and the norm before the
    /// next one. `sum, y, x, r: [n, H]`. As two kernels unless a device has one for both.
    #[allow(clippy::too_many_arguments)] // the operands of both
    fn add_rms_norm(
        &self,
        mut sum: ViewMut<'_, T, Self>,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        r: View<'_, T, Self>,
        w: View<'_, T, Self>,
        eps: f64,
    ) -> Result<()>
    where
        Self: Elementwise<T>,
    {
        self.add(sum.reborrow(), x, r)?;
        self.rms_norm(y, rstd, sum.as_view(), w, eps)
    }

    /// Overwrites `dx: [n, H]`, adds to `dw: [1, H]` in a fixed order. `past: [n, H]` is the gradient that reaches `x` past the
    /// norm, over a residual connection, and is added to `dx`.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn rms_norm_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        past: Option<View<'_, T, Self>>,
    ) -> Result<()>;

    /// `sums[i] = Σ_c x[i, c]²`. `x: [n, H]`, `sums: [1, n]`.
    fn rms_norm_sums(&self, sums: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()>;

    /// [`rms_norm`](Self::rms_norm) of rows of which `x` is a part: `mean(x²)` is `sums / width`. `sums: [1, n]`.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn rms_norm_part(
        &self,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        sums: View<'_, T::Acc, Self>,
        width: usize,
        eps: f64,
    ) -> Result<()>;

    /// `sums[i] = Σ_c dy[i, c] · w[c] · x[i, c]`. `dy, x: [n, H]`, `w: [1, H]`, `sums: [1, n]`.
    fn rms_norm_backward_sums(
        &self,
        sums: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()>;

    /// [`rms_norm_backward`](Self::rms_norm_backward), without a `past`, of rows of which `x` is a part: `mean(dy ⊙ w ⊙ x)` is `sums / width`.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn rms_norm_part_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        sums: View<'_, T::Acc, Self>,
        width: usize,
    ) -> Result<()>;
}
