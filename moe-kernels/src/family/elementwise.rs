use super::ColumnBlocks;
use crate::{Device, Float, Result, View, ViewMut};

/// Arithmetic on whole matrices.
pub trait Elementwise<T: Float>: Device {
    /// `y = a + b`.
    fn add(&self, y: ViewMut<'_, T, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()>;

    /// `y += x`.
    fn add_assign(&self, y: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()>;

    /// `y[i] += row` for every row. `y: [n, c]`, `row: [1, c]`: a bias.
    fn add_row(&self, y: ViewMut<'_, T, Self>, row: View<'_, T, Self>) -> Result<()>;

    /// `y = x` in the accumulation type (exact).
    fn widen(&self, y: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()>;

    /// `y = x`, rounded to `T`.
    fn narrow(&self, y: ViewMut<'_, T, Self>, x: View<'_, T::Acc, Self>) -> Result<()>;

    /// `y = x` in double precision (exact).
    fn widen_f64(&self, y: ViewMut<'_, f64, Self>, x: View<'_, T, Self>) -> Result<()>;

    /// `y = x`, rounded to `T`.
    fn narrow_f64(&self, y: ViewMut<'_, T, Self>, x: View<'_, f64, Self>) -> Result<()>;

    /// `y[i] = Σ_k x[index[i, k]]` in ascending `k`, summed in `T::Acc`, rounded once: the deterministic combine.
    /// `index: [n, K]`; negative entries are skipped, one past the end is an error.
    fn gather_sum(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()>;

    /// `y[i, j] = Σ_b x[i, x_at(b) + j]` over `count` blocks `b` of as many columns `j` as `y` has, ascending, summed in
    /// `T::Acc`, rounded once: backward of a block that was copied beside several.
    fn sum_column_blocks(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        x_at: ColumnBlocks,
        count: usize,
    ) -> Result<()>;
}
