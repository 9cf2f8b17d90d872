use crate::{Device, Float, Result, View, ViewMut};

/// A vector for each of consecutive row groups: the biases of the experts of an MoE layer.
///
/// `offsets: [1, E + 1]` are the first rows of the groups, as for [`GroupedGemm`](super::GroupedGemm); rows of no group are
/// neither read nor written. `scale: [1, n]`, where it is given, is a factor of each row.
pub trait GroupedBias<T: Float>: Device {
    /// `y[i] += scale[i] · bias[e]` for every row `i` of group `e`, in `T::Acc`, rounded once. `y: [n, c]`, `bias: [E, c]`.
    fn grouped_add_bias(
        &self,
        y: ViewMut<'_, T, Self>,
        bias: View<'_, T, Self>,
        scale: Option<View<'_, T::Acc, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()>;

    /// `g[e] += Σ_i scale[i] · dy[i]` over the rows of group `e`, ascending: the gradient of the bias. `g: [E, c]`,
    /// `dy: [n, c]`.
    fn grouped_bias_acc(
        &self,
        g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        scale: Option<View<'_, T::Acc, Self>>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()>;

    /// `d_scale[i] += dy[i] · bias[e]` for every row `i` of group `e`: the gradient of the factors. `d_scale: [1, n]`.
    fn grouped_bias_scale_acc(
        &self,
        d_scale: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        bias: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()>;
}
