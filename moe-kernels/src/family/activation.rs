use crate::{Device, Float, Result, View, ViewMut};

/// Gated activations.
pub trait Activation<T: Float>: Device {
    /// `y = silu(gate) ⊙ up · p` (arXiv 2002.05202). `y: [n, I]`, `gate_up: [n, 2I]` (gate first), `p: [1, n]` a
    /// probability per row, 1 if absent.
    fn swiglu(
        &self,
        y: ViewMut<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
    ) -> Result<()>;

    /// Overwrites `dgate_up: [n, 2I]` and, if given, `dp: [1, n]`.
    fn swiglu_backward(
        &self,
        dgate_up: ViewMut<'_, T, Self>,
        dp: Option<ViewMut<'_, T::Acc, Self>>,
        dy: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
    ) -> Result<()>;
}
