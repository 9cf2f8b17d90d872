use super::{Activation, GateFunction, GroupedGemm, Op};
use crate::{Device, Float, Result, Tensor, View, ViewMut, check};

/// What stands between an expert's products: `function(gate) ⊙ up · p`.
#[derive(Debug)]
pub struct Gate<'a, T: Float, D: Device> {
    /// What is applied to the gate.
    pub function: GateFunction,
    /// `[1, n]`, a probability per row, 1 if absent.
    pub p: Option<View<'a, T::Acc, D>>,
}

/// Where the gradients go by what a [`Gate`] was given.
#[derive(Debug)]
pub struct GateGradients<'a, T: Float, D: Device> {
    /// `[n, 2I]`, gate first.
    pub gate_up: ViewMut<'a, T, D>,
    /// `[1, n]`, if it is wanted.
    pub p: Option<ViewMut<'a, T::Acc, D>>,
}

/// The products of an MoE layer's experts together with the gated activation between them.
///
/// Every operation is two of [`GroupedGemm`] and [`Activation`] one after the other, and rounds as they do; a device may do both at
/// once. Groups and `offsets` are those of [`GroupedGemm`]; in rows of no group outputs hold anything afterwards.
pub trait GroupedGlu<T: Float>: GroupedGemm<T> + Activation<T> {
    /// `gate_up_e = x_e · w_eᵀ`, and `y = function(gate) ⊙ up · p`. `gate_up: [n, 2I]` (gate first), `y: [n, I]`, `x: [n, in]`,
    /// `w: [E · 2I, in]`.
    fn grouped_gemm_glu(
        &self,
        gate_up: ViewMut<'_, T, Self>,
        y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        gate: &Gate<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        gemm_then_glu(self, gate_up, y, x, w, gate, offsets)
    }

    /// The gradients of `y_e = (function(gate_e) ⊙ up_e · p_e) · w_eᵀ` by gate, up and, if given, `p`. `dy: [n, out]`, `w: [E · out, I]`,
    /// `gate_up: [n, 2I]`.
    fn grouped_gemm_glu_backward(
        &self,
        gradients: GateGradients<'_, T, Self>,
        dy: View<'_, T, Self>,
        w: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        gate: &Gate<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        gemm_then_glu_backward(self, gradients, dy, w, gate_up, gate, offsets)
    }
}

/// [`GroupedGlu::grouped_gemm_glu`] one after the other.
pub(crate) fn gemm_then_glu<T: Float, D: GroupedGemm<T> + Activation<T>>(
    device: &D,
    mut gate_up: ViewMut<'_, T, D>,
    y: ViewMut<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    gate: &Gate<'_, T, D>,
    offsets: View<'_, i32, D>,
) -> Result<()> {
    check::glu("grouped_gemm_glu", y.shape(), gate_up.as_view(), gate.p)?;
    device.grouped_gemm(gate_up.reborrow(), x, w, Op::T, offsets)?;
    device.glu(y, gate_up.as_view(), gate.p, gate.function)
}

/// [`GroupedGlu::grouped_gemm_glu_backward`] one after the other.
pub(crate) fn gemm_then_glu_backward<T: Float, D: GroupedGemm<T> + Activation<T>>(
    device: &D,
    gradients: GateGradients<'_, T, D>,
    dy: View<'_, T, D>,
    w: View<'_, T, D>,
    gate_up: View<'_, T, D>,
    gate: &Gate<'_, T, D>,
    offsets: View<'_, i32, D>,
) -> Result<()> {
    const KERNEL: &str = "grouped_gemm_glu_backward";
    let (_, [n, _, width]) = check::grouped_glu_backward(KERNEL, &gradients, dy, w, gate_up, gate, offsets)?;
    let mut d_activated = Tensor::uninit(device, n, width)?;
    device.grouped_gemm(d_activated.view_mut()?, dy, w, Op::N, offsets)?;
    device.glu_backward(gradients.gate_up, gradients.p, d_activated.view(), gate_up, gate.p, gate.function)
}
