use moe_kernels::family::{Gemm, Op, Reduce};
use moe_kernels::{Backend, Float, Tensor, View};

use super::{Routed, Router, RouterSaved, RouterStats};
use crate::{Error, Routing};

impl Router {
    /// Routes the tokens `x: [n, H]` of this rank by `weight: [E, H]`.
    ///
    /// `sum_over_unit` adds up `E + 1` counts over the ranks that share the micro-batch (the attention TP×CP group),
    /// and is called exactly once, also for `n = 0`; `|counts| Ok(counts.to_vec())` if there is but one.
    ///
    /// # Errors
    /// [`moe_kernels::Error::NotANumber`] names the first token with a NaN logit; errors of the device and of
    /// `sum_over_unit`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        x: &Tensor<T, D>,
        weight: View<'_, T, D>,
        sum_over_unit: impl FnOnce(&[i64]) -> Result<Vec<i64>, Error>,
    ) -> Result<Routed<T, D>, Error> {
        let [tokens, _] = x.shape();
        let (num_experts, top_k) = (self.config.num_experts, self.config.top_k);

        let mut logits = Tensor::<T::Acc, D>::zeros(device, tokens, num_experts)?;
        Gemm::<T>::gemm_acc(device, logits.view_mut()?, x.view(), Op::N, weight, Op::T)?;

        let mut weights = Tensor::uninit(device, tokens, top_k)?;
        let mut experts = Tensor::uninit(device, tokens, top_k)?;
        let mut probs = Tensor::uninit(device, tokens, num_experts)?;
        let mut lse = Tensor::uninit(device, 1, tokens)?;
        device.route(
            weights.view_mut()?,
            experts.view_mut()?,
            probs.view_mut()?,
            lse.view_mut()?,
            logits.view(),
            self.config.score,
        )?;

        // The plain top-k of the scores is also the actual choice: there are no biases or groups.
        let expert_counts = self.count(&experts.to_vec(device)?);
        let mut counts = expert_counts.clone();
        counts.push(tokens as i64);
        let mut unit_counts = sum_over_unit(&counts)?;
        if unit_counts.len() != num_experts + 1 {
            let what = format!("the sum of {} counts came back as {}", num_experts + 1, unit_counts.len());
            return Err(Error::Router { what });
        }
        let unit_tokens = unit_counts.split_off(num_experts)[0];

        let stats = RouterStats {
            aux_loss: self.aux_loss(&column_sums::<T, D>(device, &probs)?, &unit_counts, unit_tokens),
            z_loss_sum: sum_of_squares::<T, D>(device, &lse)?,
            expert_counts,
        };
        let routing = Routing { experts: experts.clone(), weights: weights.clone(), tokens, top_k };
        let saved = RouterSaved { x: x.clone(), experts, weights, probs, lse, unit_counts, unit_tokens };
        Ok((routing, saved, stats))
    }

    fn count(&self, experts: &[i32]) -> Vec<i64> {
        let mut counts = vec![0; self.config.num_experts];
        for &expert in experts {
            counts[expert as usize] += 1;
        }
        counts
    }

    /// `E/(K·T²) Σ_e C_e·P_e`, 0 without tokens.
    fn aux_loss(&self, probs: &[f64], counts: &[i64], tokens: i64) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let sum: f64 = probs.iter().zip(counts).map(|(p, &c)| p * c as f64).sum();
        sum * self.config.num_experts as f64 / (self.config.top_k as f64 * (tokens as f64).powi(2))
    }
}

fn column_sums<T: Float, D: Backend<T>>(device: &D, probs: &Tensor<T::Acc, D>) -> Result<Vec<f64>, Error> {
    let mut sums = Tensor::<T::Acc, D>::uninit(device, 1, probs.shape()[1])?;
    Reduce::<T::Acc>::column_sums(device, sums.view_mut()?, probs.view())?;
    Ok(sums.to_f64(device)?)
}

fn sum_of_squares<T: Float, D: Backend<T>>(device: &D, lse: &Tensor<T::Acc, D>) -> Result<f64, Error> {
    let mut sum = Tensor::<f64, D>::zeros(device, 1, 1)?;
    Reduce::<T::Acc>::dot(device, sum.view_mut()?, lse.view(), lse.view())?;
    Ok(sum.to_vec(device)?[0])
}
