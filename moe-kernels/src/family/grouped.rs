use super::Op;
use crate::{Device, Float, Result, View, ViewMut};

/// Matrix products of consecutive row groups with a weight each: the experts of an MoE layer.
///
/// `offsets: [1, E + 1]` are the first rows of the groups, ascending from 0, on the device; rows from
/// `offsets[E]` on belong to no group: they are neither read nor written. A group may be empty.
pub trait GroupedGemm<T: Float>: Device {
    /// For every group `e`: `y_e = x_e · op(w_e)`.
    ///
    /// `w: [E · out, in]` holds the groups' weights `[out, in]` one after the other. With [`Op::T`] (forward)
    /// `x: [n, in]`, `y: [n, out]`; with [`Op::N`] (input gradient) `x: [n, out]`, `y: [n, in]`.
    fn grouped_gemm(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        tw: Op,
        offsets: View<'_, i32, Self>,
    ) -> Result<()>;

    /// For every group `e`: `g_e = dy_eᵀ · x_e`, whatever `g` holds: where a weight gradient is written first; 0 for an
    /// empty group. Shapes as below.
    fn grouped_gemm_to_acc(
        &self,
        mut g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        g.zero(self)?;
        self.grouped_gemm_acc(g, dy, x, offsets)
    }

    /// For every group `e`: `g_e += dy_eᵀ · x_e` (weight gradient). `g: [E · out, in]`, `dy: [n, out]`,
    /// `x: [n, in]`.
    fn grouped_gemm_acc(
        &self,
        g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()>;
}
