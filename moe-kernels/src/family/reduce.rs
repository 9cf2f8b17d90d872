use crate::{Device, Float, Result, View, ViewMut};

/// Sums.
pub trait Reduce<T: Float>: Device {
    /// `out += Σ a ⊙ b`, products and sum in f64, in a fixed order. `out: [1, 1]`; squares with `a = b`.
    fn dot(&self, out: ViewMut<'_, f64, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()>;

    /// `out[c] = Σ_i x[i, c]`, ascending rows. `out: [1, cols]`.
    fn column_sums(&self, out: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()>;
}
