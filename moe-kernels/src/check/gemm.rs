//! Matrix products, dense and of row groups.

use super::shape;
use crate::family::{Gate, GateGradients, Op};
use crate::{Device, Float, Result, View, ViewMut};

/// An error unless `op(a) · op(b)` has the shape of `y`; the shapes are those of `y`, `op(a)` and `op(b)`.
pub(crate) fn product(kernel: &'static str, y: [usize; 2], a: [usize; 2], b: [usize; 2]) -> Result<()> {
    shape(kernel, "op(a)", [y[0], b[0]], a)?;
    shape(kernel, "op(b)", [a[1], y[1]], b)
}

/// Operands of `gemm_backward`: `[m, n, k]`.
pub(crate) fn gemm_backward<T: Float, D: Device>(
    kernel: &'static str,
    dx: &ViewMut<'_, T, D>,
    dw: &ViewMut<'_, T::Acc, D>,
    dy: View<'_, T::Acc, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
) -> Result<[usize; 3]> {
    let ([m, k], [_, n]) = (dy.shape(), x.shape());
    shape(kernel, "x", [m, n], x.shape())?;
    shape(kernel, "w", [k, n], w.shape())?;
    shape(kernel, "dx", [m, n], dx.shape())?;
    shape(kernel, "dw", [k, n], dw.shape())?;
    Ok([m, n, k])
}

/// The number of groups that `offsets` are of.
pub(crate) fn groups<D: Device>(kernel: &'static str, offsets: View<'_, i32, D>) -> Result<usize> {
    let entries = offsets.shape()[1].max(1);
    shape(kernel, "offsets", [1, entries], offsets.shape())?;
    Ok(entries - 1)
}

/// Operands of `grouped_gemm`: the number of groups, and the shape `[out, in]` of each one's weight.
pub(crate) fn grouped_gemm<T: Float, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, T, D>,
    x: View<'_, T, D>,
    w: View<'_, T, D>,
    tw: Op,
    offsets: View<'_, i32, D>,
) -> Result<(usize, [usize; 2])> {
    let ([n, to], [_, from]) = (y.shape(), x.shape());
    let [out, input] = match tw {
        Op::T => [to, from],
        Op::N => [from, to],
    };
    shape(kernel, "x", [n, from], x.shape())?;
    let groups = groups(kernel, offsets)?;
    shape(kernel, "w", [groups * out, input], w.shape())?;
    Ok((groups, [out, input]))
}

/// Operands of `grouped_gemm_acc`: the number of groups, and the shape `[out, in]` of each one's gradient.
pub(crate) fn grouped_gemm_acc<T: Float, D: Device>(
    kernel: &'static str,
    g: &ViewMut<'_, T::Acc, D>,
    dy: View<'_, T, D>,
    x: View<'_, T, D>,
    offsets: View<'_, i32, D>,
) -> Result<(usize, [usize; 2])> {
    let ([n, out], [_, input]) = (dy.shape(), x.shape());
    shape(kernel, "x", [n, input], x.shape())?;
    let groups = groups(kernel, offsets)?;
    shape(kernel, "g", [groups * out, input], g.shape())?;
    Ok((groups, [out, input]))
}

/// Operands of `grouped_gemm_glu_backward`: the number of groups, and `[n, out, I]`.
pub(crate) fn grouped_glu_backward<T: Float, D: Device>(
    kernel: &'static str,
    gradients: &GateGradients<'_, T, D>,
    dy: View<'_, T, D>,
    w: View<'_, T, D>,
    gate_up: View<'_, T, D>,
    gate: &Gate<'_, T, D>,
    offsets: View<'_, i32, D>,
) -> Result<(usize, [usize; 3])> {
    let ([n, out], [_, width]) = (dy.shape(), w.shape());
    super::glu(kernel, [n, width], gate_up, gate.p)?;
    shape(kernel, "gradient of gate_up", [n, 2 * width], gradients.gate_up.shape())?;
    if let Some(p) = &gradients.p {
        shape(kernel, "gradient of p", [1, n], p.shape())?;
    }
    let groups = groups(kernel, offsets)?;
    shape(kernel, "w", [groups * out, width], w.shape())?;
    Ok((groups, [n, out, width]))
}
