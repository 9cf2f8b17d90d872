use moe_kernels::family::{Balance, BalanceTerm, BalanceTerms, Elementwise, Gemm, Op, Routing};
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};

use super::types::{copied, narrowed, narrowed_f64, widened, widened_f64};
use super::{ModelUnit, Router, RouterConfig, RouterInput, RouterSaved, RouterScales, RouterSum, Scores};
use crate::Error;

impl Router {
    /// Adds the gradient of the objective by the router's input to `dx: [n, H]`, and that by its weight, a sum over this
    /// rank's tokens, to `dweight: [E, H]`.
    ///
    /// `input` is that of the forward pass, which is not kept here: a caller may have it from elsewhere, or make it again.
    /// `dweights` is the gradient by the weights of the choices, `n · K` numbers as a dispatcher returns them; those
    /// of the losses are added here.
    ///
    /// # Errors
    /// [`Error::Router`] if the scales say that the step has no tokens while this rank has (and no padding among them), or lack the
    /// counts of a loss over the whole step or all layers; errors of the device.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        input: RouterInput<'_, T, D>,
        dweights: &Tensor<T::Acc, D>,
        saved: RouterSaved<T, D>,
        dx: ViewMut<'_, T, D>,
        dweight: ViewMut<'_, T::Acc, D>,
        scales: RouterScales<'_, D>,
    ) -> Result<(), Error> {
        let RouterInput { x, weight, jitter, .. } = input;
        let RouterSaved { experts, scores, unit, padded, .. } = saved;
        let [tokens, hidden] = x.shape();
        let RouterConfig { num_experts, top_k, .. } = self.config;

        if tokens == 0 {
            return Ok(());
        }
        let empty = scales.micro_batches == 0 || scales.sequences == 0 || scales.valid_tokens == 0;
        if empty && !padded {
            return Err(Error::Router { what: format!("{tokens} tokens in a step of {scales:?}") });
        }
        let RouterConfig { global_aux_loss_coef, model_aux_loss_coef, .. } = self.config;
        for (over, coef, counts) in [
            ("the whole step", global_aux_loss_coef, scales.step_counts),
            ("all layers", model_aux_loss_coef, scales.model_counts),
        ] {
            let got = counts.map_or(0, |counts| counts.layout().len());
            if coef != 0.0 && got != num_experts {
                let what =
                    format!("the load-balancing loss over {over} needs {num_experts} counts, but got {got}");
                return Err(Error::Router { what });
            }
        }
        let dweights = dweights.reshape(tokens, top_k)?;
        let (experts, unit) = (experts.view(), unit.view());

        // Products of the logits' type, as forward: rounding their gradient to T would lose the small losses.
        match scores {
            Scores::Acc(scores) => {
                let dlogits = self.dlogits(device, dweights.view(), experts, &scores.logits, unit, scales)?;
                let Some(jitter) = &jitter else {
                    let dlogits = dlogits.view();
                    return Ok(Gemm::<T>::gemm_backward(device, dx, dweight, dlogits, x.view(), weight)?);
                };
                let mut noisy = copied::<T, D>(device, x.view())?;
                jitter.apply(device, &mut noisy)?;
                let mut wide_weight = None;
                let weight = widened(device, weight, &mut wide_weight)?;
                Gemm::<T::Acc>::gemm_acc(device, dweight, dlogits.view(), Op::T, noisy.view(), Op::N)?;
                let mut own = Tensor::<T::Acc, D>::uninit(device, tokens, hidden)?;
                Gemm::<T::Acc>::gemm(device, own.view_mut()?, dlogits.view(), Op::N, weight, Op::N)?;
                jitter.apply(device, &mut own)?;
                let own = narrowed::<T, D>(device, own)?;
                Ok(Elementwise::<T>::add_assign(device, dx, own.view())?)
            }
            Scores::F64(scores) => {
                let dweights = widened_f64::<T::Acc, D>(device, dweights.view())?;
                let dlogits = self.dlogits(device, dweights.view(), experts, &scores.logits, unit, scales)?;
                let (mut x, weight) = (widened_f64(device, x.view())?, widened_f64(device, weight)?);
                if let Some(jitter) = &jitter {
                    jitter.apply(device, &mut x)?;
                }
                let mut own = Tensor::<f64, D>::uninit(device, num_experts, hidden)?;
                Gemm::<f64>::gemm(device, own.view_mut()?, dlogits.view(), Op::T, x.view(), Op::N)?;
                let own = narrowed_f64::<T::Acc, D>(device, &own)?;
                Elementwise::<T::Acc>::add_assign(device, dweight, own.view())?;
                let mut own = Tensor::<f64, D>::uninit(device, tokens, hidden)?;
                Gemm::<f64>::gemm(device, own.view_mut()?, dlogits.view(), Op::N, weight.view(), Op::N)?;
                if let Some(jitter) = &jitter {
                    jitter.apply(device, &mut own)?;
                }
                let own = narrowed_f64::<T, D>(device, &own)?;
                Ok(Elementwise::<T>::add_assign(device, dx, own.view())?)
            }
        }
    }

    /// Adds to `sums` what this rank, layer and micro-batch add to the load-balancing loss over all layers of their unit,
    /// without coefficient: `E Σ_e C_e·P_e/(M·T)²` with `C` of the unit and all layers; nothing without `model_counts`.
    ///
    /// # Errors
    /// The counts are of other experts.
    pub fn add_model_aux_loss<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        saved: &RouterSaved<T, D>,
        scales: RouterScales<'_, D>,
        mut sums: RouterSum<'_, D>,
    ) -> Result<(), Error> {
        let Some(term) = self.model_term(1.0, scales) else { return Ok(()) };
        let (sum, unit) = (sums.model_aux_loss()?, saved.unit.view());
        match &saved.scores {
            Scores::Acc(scores) => add_dot(device, sum, scores.probs.as_ref(), unit, term),
            Scores::F64(scores) => add_dot(device, sum, scores.probs.as_ref(), unit, term),
        }
    }

    /// The gradient of the objective by the logits, `[n, E]`, in their type.
    fn dlogits<R: Float<Acc = R>, D: Routing<R> + Balance<R>>(
        &self,
        device: &D,
        dweights: View<'_, R, D>,
        experts: View<'_, i32, D>,
        logits: &Tensor<R, D>,
        unit: View<'_, i64, D>,
        scales: RouterScales<'_, D>,
    ) -> Result<Tensor<R, D>, Error> {
        let RouterConfig { num_experts, scoring, .. } = self.config;
        // Without valid tokens no row has a gradient.
        let z = self.config.z_loss_coef / scales.valid_tokens.max(1) as f64;
        let mut aux = Tensor::<R, D>::uninit(device, unit.shape()[0], num_experts)?;
        device.balance_gradient(aux.view_mut()?, self.terms(unit, scales))?;
        let mut dlogits = Tensor::<R, D>::uninit(device, logits.shape()[0], num_experts)?;
        device.route_backward(
            dlogits.view_mut()?,
            dweights,
            experts,
            logits.view(),
            &scoring,
            aux.view(),
            z,
        )?;
        Ok(dlogits)
    }

    /// The derivative of the objective by a token's probabilities: the sum over the losses of `c·E·C_e/(n_u·K·T²)`.
    fn terms<'a, D: Device>(
        &self,
        unit: View<'a, i64, D>,
        scales: RouterScales<'a, D>,
    ) -> BalanceTerms<'a, D> {
        let RouterConfig { num_experts, top_k, .. } = self.config;
        let factor = |coef: f64, units: u64| {
            if units == 0 { 0.0 } else { coef * num_experts as f64 / (units as f64 * top_k as f64) }
        };
        let of_step =
            factor(self.config.global_aux_loss_coef, 1) / (scales.valid_tokens.max(1) as f64).powi(2);
        let units = match scales.model_unit {
            ModelUnit::MicroBatch => scales.micro_batches.max(1),
            ModelUnit::Step => 1,
        };
        BalanceTerms {
            unit,
            micro_batch: factor(self.config.aux_loss_coef, scales.micro_batches),
            sequence: factor(self.config.sequence_aux_loss_coef, scales.sequences),
            step: scales.step_counts.map(|counts| BalanceTerm { counts, factor: of_step, per_token: false }),
            model: self.model_term(self.config.model_aux_loss_coef / units as f64, scales),
        }
    }

    /// `coef·E/(M·T)²` and the counts of all layers, for a unit of `T` tokens.
    fn model_term<'a, D: Device>(
        &self,
        coef: f64,
        scales: RouterScales<'a, D>,
    ) -> Option<BalanceTerm<'a, D>> {
        let counts = scales.model_counts?;
        let factor = coef * self.config.num_experts as f64 / (scales.moe_layers.max(1) as f64).powi(2);
        Some(match scales.model_unit {
            ModelUnit::MicroBatch => BalanceTerm { counts, factor, per_token: true },
            ModelUnit::Step => {
                let factor = factor / (scales.valid_tokens.max(1) as f64).powi(2);
                BalanceTerm { counts, factor, per_token: false }
            }
        })
    }
}

/// `sum += factor · Σ_e C_e·P_e`, of shares that are kept where there is such a loss.
fn add_dot<R: Float<Acc = R>, D: Balance<R>>(
    device: &D,
    sum: ViewMut<'_, f64, D>,
    probs: Option<&Tensor<R, D>>,
    unit: View<'_, i64, D>,
    term: BalanceTerm<'_, D>,
) -> Result<(), Error> {
    match probs {
        Some(probs) => Ok(device.balance_dot(sum, probs.view(), unit, term)?),
        None => Ok(()),
    }
}
