//! Optimizer updates.

use half::bf16;

use super::Cuda;
use super::source::OPTIM;
use super::vectors::{vector, vectors};
use crate::family::{AdamW, MomentMut, Optim};
use crate::{Element, Float, Result, View, ViewMut, check};

/// Threads of a block.
const THREADS: usize = 256;

/// `Factors` of the kernels: those of one update, rounded to the type of the master weights.
fn factors<A: Float>(h: &AdamW) -> [A; 9] {
    let step = h.step as f64;
    [
        h.grad_scale,
        h.beta1,
        1.0 - h.beta1,
        h.beta2,
        1.0 - h.beta2,
        h.lr / (1.0 - h.beta1.powf(step)),
        1.0 / (1.0 - h.beta2.powf(step)),
        h.eps,
        1.0 - h.lr * h.weight_decay,
    ]
    .map(A::from_f64)
}

impl Cuda {
    /// The update by the kernel for moments of these types.
    #[allow(clippy::too_many_arguments)] // the operands of the update
    fn adamw_by<T: Float, M: Element, V: Element>(
        &self,
        kernel: &'static str,
        mut weight: Option<ViewMut<'_, T, Self>>,
        mut master: ViewMut<'_, T::Acc, Self>,
        mut m: ViewMut<'_, M, Self>,
        mut v: ViewMut<'_, V, Self>,
        grad: View<'_, T::Acc, Self>,
        hyper: &AdamW,
    ) -> Result<()> {
        let [_, n] = grad.shape();
        let each = vector::<T::Acc>();
        let vectors = weight.as_ref().is_none_or(|weight| vectors(weight.as_view(), each))
            && vectors(master.as_view(), each)
            && vectors(m.as_view(), each)
            && vectors(v.as_view(), each)
            && vectors(grad, each);
        let launch = self.kernel(&OPTIM.of(T::DTYPE), kernel)?.vector_mut_or_null(weight.as_mut());
        let launch =
            launch.vector_mut(&mut master).vector_mut(&mut m).vector_mut(&mut v).vector(grad).size(n);
        let launch = launch.value(factors::<T::Acc>(hyper)).value(i32::from(vectors));
        // SAFETY: all operands have `n` elements, which the kernel touches.
        unsafe { launch.grid([n.div_ceil(THREADS * each), 1, 1]).block([THREADS, 1, 1]).launch() }
    }
}

impl<T: Float> Optim<T> for Cuda {
    fn adamw(
        &self,
        weight: Option<ViewMut<'_, T, Self>>,
        master: ViewMut<'_, T::Acc, Self>,
        m: MomentMut<'_, T::Acc, Self>,
        v: MomentMut<'_, T::Acc, Self>,
        grad: View<'_, T::Acc, Self>,
        hyper: &AdamW,
    ) -> Result<()> {
        check::adamw("adamw", weight.as_ref(), &master, &m, &v, grad, hyper)?;
        use MomentMut::{Acc, Bf16};
        match (m, v) {
            (Acc(m), Acc(v)) => {
                self.adamw_by::<T, T::Acc, T::Acc>("adamw_acc_acc", weight, master, m, v, grad, hyper)
            }
            (Bf16(m), Acc(v)) => {
                self.adamw_by::<T, bf16, T::Acc>("adamw_bf16_acc", weight, master, m, v, grad, hyper)
            }
            (Acc(m), Bf16(v)) => {
                self.adamw_by::<T, T::Acc, bf16>("adamw_acc_bf16", weight, master, m, v, grad, hyper)
            }
            (Bf16(m), Bf16(v)) => {
                self.adamw_by::<T, bf16, bf16>("adamw_bf16_bf16", weight, master, m, v, grad, hyper)
            }
        }
    }
}
