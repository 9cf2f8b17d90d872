//! Gated activations.

use super::Cuda;
use super::lanes::Lanes;
use super::launch::Launch;
use super::source::ACTIVATION;
use super::vectors::{in_vectors, vector};
use crate::family::{Activation, GateFunction};
use crate::{Float, Result, View, ViewMut, check};

/// A kernel of `n` rows of `width` elements, the first name where they are whole vectors.
fn of_rows<'a, T: Float>(
    gpu: &'a Cuda,
    [of_vectors, any]: [&'static str; 2],
    in_vectors: bool,
    [n, width]: [usize; 2],
) -> Result<Launch<'a>> {
    let (name, lanes) = match in_vectors && width.is_multiple_of(vector::<T>()) {
        true => (of_vectors, Lanes::of(width / vector::<T>())),
        false => (any, Lanes::of(width)),
    };
    Ok(gpu.kernel(&ACTIVATION.of(T::DTYPE), name)?.grid(lanes.grid(n)).block(lanes.block()))
}

impl<T: Float> Activation<T> for Cuda {
    fn glu(
        &self,
        mut y: ViewMut<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
        function: GateFunction,
    ) -> Result<()> {
        const KERNEL: &str = "glu";
        let [n, width] = check::glu(KERNEL, y.shape(), gate_up, p)?;
        let names = match function {
            GateFunction::Silu => ["silu", "silu_any"],
            GateFunction::GeluTanh => ["gelu_tanh", "gelu_tanh_any"],
        };
        let fits = in_vectors(y.as_view()) && in_vectors(gate_up);
        let launch = of_rows::<T>(self, names, fits, [n, width])?.mat_mut(&mut y).mat(gate_up);
        // SAFETY: the kernel touches `n` rows of `width` elements of `y`, twice as many of `gate_up`, and `n` of `p`.
        unsafe { launch.vector_or_null(p).size(n).size(width).launch() }
    }

    fn glu_backward(
        &self,
        mut dgate_up: ViewMut<'_, T, Self>,
        mut dp: Option<ViewMut<'_, T::Acc, Self>>,
        dy: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T::Acc, Self>>,
        function: GateFunction,
    ) -> Result<()> {
        const KERNEL: &str = "glu_backward";
        let [n, width] = check::glu_backward(KERNEL, &dgate_up, dp.as_ref(), dy, gate_up, p)?;
        let names = match function {
            GateFunction::Silu => ["silu_backward", "silu_backward_any"],
            GateFunction::GeluTanh => ["gelu_tanh_backward", "gelu_tanh_backward_any"],
        };
        let fits = in_vectors(dgate_up.as_view()) && in_vectors(dy) && in_vectors(gate_up);
        let launch = of_rows::<T>(self, names, fits, [n, width])?.mat_mut(&mut dgate_up);
        let launch = launch.vector_mut_or_null(dp.as_mut()).mat(dy).mat(gate_up).vector_or_null(p);
        // SAFETY: the kernel touches `n` rows of `width` elements of `dy`, twice as many of `gate_up` and `dgate_up`, and `n` of
        // `p` and `dp`.
        unsafe { launch.size(n).size(width).launch() }
    }

    fn sigmoid_gate(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "sigmoid_gate";
        let [n, width] = check::sigmoid_gate(KERNEL, y.shape(), x, gate)?;
        let fits = in_vectors(y.as_view()) && in_vectors(x);
        let launch = of_rows::<T>(self, ["sigmoid_gate", "sigmoid_gate_any"], fits, [n, width])?;
        // SAFETY: the kernel touches `n` rows of `width` elements, and one element of each row of `gate`.
        unsafe { launch.mat_mut(&mut y).mat(x).mat(gate).size(n).size(width).launch() }
    }

    fn sigmoid_gate_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        mut dgate: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "sigmoid_gate_backward";
        let [n, width] = check::sigmoid_gate(KERNEL, dx.shape(), x, gate)?;
        check::shape(KERNEL, "dy", [n, width], dy.shape())?;
        check::shape(KERNEL, "dgate", [n, 1], dgate.shape())?;
        let fits = in_vectors(dx.as_view()) && in_vectors(dy) && in_vectors(x);
        let names = ["sigmoid_gate_backward", "sigmoid_gate_backward_any"];
        let launch = of_rows::<T>(self, names, fits, [n, width])?.mat_mut(&mut dx).mat_mut(&mut dgate);
        // SAFETY: the kernel touches `n` rows of `width` elements, and one element of each row of `gate` and `dgate`.
        unsafe { launch.mat(dy).mat(x).mat(gate).size(n).size(width).launch() }
    }
}
