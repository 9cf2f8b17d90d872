use crate::{Device, Float, Result, View, ViewMut};

/// What a gated linear unit applies to its gate (arXiv 2002.05202).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GateFunction {
    /// `g · σ(g)`: SwiGLU.
    #[default]
    Silu,
    /// `g/2 · (1 + tanh(√(2/π)·(g + 0.044715·g³)))`: GeGLU with the tanh approximation of GELU (arXiv 1606.08415).
    GeluTanh,
}

/// Gated activations.
pub trait Activation<T: Float>: Device {
    /// `y = function(gate) ⊙ up · p`. `y: [n, I]`, `gate_up: [n, 2I]` (gate first), `p: [1, n]` a probability per row, 1
    /// if absent.
    fn glu(
        &self,
        y: ViewMut<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
        function: GateFunction,
    ) -> Result<()>;

    /// Overwrites `dgate_up: [n, 2I]` and, if given, `dp: [1, n]`.
    fn glu_backward(
        &self,
        dgate_up: ViewMut<'_, T, Self>,
        dp: Option<ViewMut<'_, T::Acc, Self>>,
        dy: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
        function: GateFunction,
    ) -> Result<()>;

    /// `y[i] = σ(gate[i]) · x[i]`. `y, x: [n, H]`, `gate: [n, 1]`.
    fn sigmoid_gate(
        &self,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()>;

    /// Overwrites `dx: [n, H]` and `dgate: [n, 1]`.
    fn sigmoid_gate_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dgate: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()>;
}
