use crate::{Device, Float, Result, View, ViewMut, check};

/// Sums.
pub trait Reduce<T: Float>: Device {
    /// `out += Σ a ⊙ b`, products and sum in f64, in a fixed order. `out: [1, 1]`; squares with `a = b`.
    fn dot(&self, out: ViewMut<'_, f64, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()>;

    /// `out[i] += Σ x²` for each piece `(i, x)`, `x: [1, n]`, squares and sums in f64, in a fixed order; several pieces of one
    /// `i` in the order in which they are listed. `out: [1, n]`.
    ///
    /// One [`dot`](Self::dot) after the other, unless a device does better.
    fn sums_of_squares(
        &self,
        mut out: ViewMut<'_, f64, Self>,
        pieces: &[(usize, View<'_, T, Self>)],
    ) -> Result<()> {
        let [_, n] = out.shape();
        check::shape("sums_of_squares", "out", [1, n], out.shape())?;
        for &(i, x) in pieces {
            let [_, len] = x.shape();
            check::shape("sums_of_squares", "a piece", [1, len], x.shape())?;
            self.dot(out.reborrow().columns(i..i.saturating_add(1))?, x, x)?;
        }
        Ok(())
    }

    /// `out[c] = Σ_i x[i, c]`, ascending rows. `out: [1, cols]`.
    fn column_sums(&self, out: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()>;
}
