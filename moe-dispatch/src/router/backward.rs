use moe_kernels::family::{Elementwise, Gemm, Op};
use moe_kernels::{Backend, Float, Tensor, View, ViewMut};

use super::{Router, RouterSaved, RouterScales};
use crate::Error;

impl Router {
    /// The gradient of the objective by the router's input, `[n, H]`; that by its weight is added to
    /// `dweight: [E, H]`, a sum over this rank's tokens.
    ///
    /// `dweights` is the gradient by the weights of the choices, `n · K` numbers as a dispatcher returns them; those
    /// of the two losses are added here.
    ///
    /// # Errors
    /// [`Error::Router`] if the scales say that the step has no tokens while this rank has; errors of the device.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        dweights: &Tensor<T::Acc, D>,
        saved: RouterSaved<T, D>,
        weight: View<'_, T, D>,
        dweight: ViewMut<'_, T::Acc, D>,
        scales: RouterScales,
    ) -> Result<Tensor<T, D>, Error> {
        let RouterSaved { x, experts, weights, probs, lse, unit_counts, unit_tokens } = saved;
        let [tokens, hidden] = x.shape();
        let (num_experts, top_k) = (self.config.num_experts, self.config.top_k);

        if tokens == 0 {
            return Ok(Tensor::uninit(device, 0, hidden)?);
        }
        let RouterScales { micro_batches, valid_tokens } = scales;
        if micro_batches == 0 || valid_tokens == 0 {
            let what =
                format!("{tokens} tokens in a step of {micro_batches} micro-batches, {valid_tokens} tokens");
            return Err(Error::Router { what });
        }
        let aux = self.aux_gradient(&unit_counts, unit_tokens, micro_batches);
        let aux = Tensor::<T::Acc, D>::from_f64(device, 1, num_experts, &aux)?;
        let z = self.config.z_loss_coef / valid_tokens as f64;
        let mut dlogits = Tensor::<T::Acc, D>::uninit(device, tokens, num_experts)?;
        device.route_backward(
            dlogits.view_mut()?,
            dweights.reshape(tokens, top_k)?.view(),
            weights.view(),
            experts.view(),
            probs.view(),
            lse.view(),
            self.config.score,
            aux.view(),
            z,
        )?;

        // Products of the accumulation type, as forward: rounding dlogits to T would lose the small losses.
        let (mut wide_x, mut wide_weight) = (None, None);
        let x = widened(device, x.view(), &mut wide_x)?;
        let weight = widened(device, weight, &mut wide_weight)?;
        Gemm::<T::Acc>::gemm_acc(device, dweight, dlogits.view(), Op::T, x, Op::N)?;
        let mut dx = Tensor::<T::Acc, D>::uninit(device, tokens, hidden)?;
        Gemm::<T::Acc>::gemm(device, dx.view_mut()?, dlogits.view(), Op::N, weight, Op::N)?;
        narrowed(device, dx)
    }

    /// `c_aux·E·C_e/(n_u·K·T²)` for every expert, the derivative of the objective by a token's probability.
    fn aux_gradient(&self, counts: &[i64], tokens: i64, micro_batches: u64) -> Vec<f64> {
        let divisor = micro_batches as f64 * self.config.top_k as f64 * (tokens as f64).powi(2);
        let factor = self.config.aux_loss_coef * self.config.num_experts as f64 / divisor;
        counts.iter().map(|&count| factor * count as f64).collect()
    }
}

/// True if `T` is its own accumulation type, so that its bytes need no conversion.
fn is_wide<T: Float>() -> bool {
    T::DTYPE == <T::Acc as moe_kernels::Element>::DTYPE
}

/// `x` in the accumulation type: the same memory if that is `T`, else a copy in `hold`.
fn widened<'a, T: Float, D: Backend<T>>(
    device: &D,
    x: View<'a, T, D>,
    hold: &'a mut Option<Tensor<T::Acc, D>>,
) -> Result<View<'a, T::Acc, D>, Error> {
    if is_wide::<T>() {
        return Ok(View::new(x.buf(), x.layout())?);
    }
    let [rows, cols] = x.shape();
    let mut wide = Tensor::uninit(device, rows, cols)?;
    Elementwise::<T>::widen(device, wide.view_mut()?, x)?;
    Ok(hold.insert(wide).view())
}

/// `x` rounded to `T`: the same memory if that is the accumulation type.
fn narrowed<T: Float, D: Backend<T>>(device: &D, x: Tensor<T::Acc, D>) -> Result<Tensor<T, D>, Error> {
    if is_wide::<T>() {
        return Ok(Tensor::from_buf(x.buf().clone(), x.layout())?);
    }
    let [rows, cols] = x.shape();
    let mut narrow = Tensor::uninit(device, rows, cols)?;
    Elementwise::<T>::narrow(device, narrow.view_mut()?, x.view())?;
    Ok(narrow)
}
