use moe_kernels::family::{Elementwise, Gemm, Op, Routing};
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};

use super::types::{copied, narrowed, narrowed_f64, widened, widened_f64};
use super::{Logits, ModelUnit, Router, RouterConfig, RouterInput, RouterSaved, RouterScales, UnitCounts};
use crate::Error;

/// What the losses add to the gradient by the logits.
struct Losses {
    /// The derivative of the objective by a token's probabilities, a row of E for each sequence.
    aux: Vec<f64>,
    /// The derivative by the square of a token's log-sum-exp.
    z: f64,
}

impl Router {
    /// The gradient of the objective by the router's input, `[n, H]`; that by its weight is added to
    /// `dweight: [E, H]`, a sum over this rank's tokens.
    ///
    /// `input` is that of the forward pass, which is not kept here: a caller may have it from elsewhere, or make it again.
    /// `dweights` is the gradient by the weights of the choices, `n · K` numbers as a dispatcher returns them; those
    /// of the two losses are added here.
    ///
    /// # Errors
    /// [`Error::Router`] if the scales say that the step has no tokens while this rank has, or lack the counts of a loss over
    /// the whole step or all layers; errors of the device.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        input: RouterInput<'_, T, D>,
        dweights: &Tensor<T::Acc, D>,
        saved: RouterSaved<T, D>,
        dweight: ViewMut<'_, T::Acc, D>,
        scales: RouterScales<'_>,
    ) -> Result<Tensor<T, D>, Error> {
        let RouterInput { x, weight, jitter, .. } = input;
        let RouterSaved { experts, logits, unit, .. } = saved;
        let [tokens, hidden] = x.shape();
        let RouterConfig { num_experts, top_k, .. } = self.config;

        if tokens == 0 {
            return Ok(Tensor::uninit(device, 0, hidden)?);
        }
        let (_, valid) = unit.micro_batch();
        if valid > 0 && (scales.micro_batches == 0 || scales.sequences == 0 || scales.valid_tokens == 0) {
            return Err(Error::Router { what: format!("{valid} tokens in a step of {scales:?}") });
        }
        let RouterConfig { global_aux_loss_coef, model_aux_loss_coef, .. } = self.config;
        for (over, coef, counts) in [
            ("the whole step", global_aux_loss_coef, scales.step_counts),
            ("all layers", model_aux_loss_coef, scales.model_counts),
        ] {
            if coef != 0.0 && counts.len() != num_experts {
                let got = counts.len();
                let what =
                    format!("the load-balancing loss over {over} needs {num_experts} counts, but got {got}");
                return Err(Error::Router { what });
            }
        }
        let dweights = dweights.reshape(tokens, top_k)?;
        let losses = Losses {
            aux: self.aux_gradient(&unit, scales),
            // Without valid tokens no row has a gradient.
            z: self.config.z_loss_coef / scales.valid_tokens.max(1) as f64,
        };

        // Products of the logits' type, as forward: rounding their gradient to T would lose the small losses.
        match logits {
            Logits::Acc(logits) => {
                let dlogits = self.dlogits(device, dweights.view(), experts.view(), &logits, &losses)?;
                let (mut wide_x, mut wide_weight) = (None, None);
                let x = match &jitter {
                    None => widened(device, x.view(), &mut wide_x)?,
                    Some(jitter) => {
                        let noisy = wide_x.insert(copied::<T, D>(device, x.view())?);
                        jitter.apply(device, noisy)?;
                        noisy.view()
                    }
                };
                let weight = widened(device, weight, &mut wide_weight)?;
                Gemm::<T::Acc>::gemm_acc(device, dweight, dlogits.view(), Op::T, x, Op::N)?;
                let mut dx = Tensor::<T::Acc, D>::uninit(device, tokens, hidden)?;
                Gemm::<T::Acc>::gemm(device, dx.view_mut()?, dlogits.view(), Op::N, weight, Op::N)?;
                if let Some(jitter) = &jitter {
                    jitter.apply(device, &mut dx)?;
                }
                narrowed(device, dx)
            }
            Logits::F64(logits) => {
                let dweights = widened_f64::<T::Acc, D>(device, dweights.view())?;
                let dlogits = self.dlogits(device, dweights.view(), experts.view(), &logits, &losses)?;
                let (mut x, weight) = (widened_f64(device, x.view())?, widened_f64(device, weight)?);
                if let Some(jitter) = &jitter {
                    jitter.apply(device, &mut x)?;
                }
                let mut own = Tensor::<f64, D>::uninit(device, num_experts, hidden)?;
                Gemm::<f64>::gemm(device, own.view_mut()?, dlogits.view(), Op::T, x.view(), Op::N)?;
                let own = narrowed_f64::<T::Acc, D>(device, &own)?;
                Elementwise::<T::Acc>::add_assign(device, dweight, own.view())?;
                let mut dx = Tensor::<f64, D>::uninit(device, tokens, hidden)?;
                Gemm::<f64>::gemm(device, dx.view_mut()?, dlogits.view(), Op::N, weight.view(), Op::N)?;
                if let Some(jitter) = &jitter {
                    jitter.apply(device, &mut dx)?;
                }
                narrowed_f64(device, &dx)
            }
        }
    }

    /// What this rank, layer and micro-batch add to the load-balancing loss over all layers of their unit, without
    /// coefficient: `E Σ_e C_e·P_e/(M·T)²` with `C` of the unit and all layers; 0 without `model_counts`.
    pub fn model_aux_loss<T: Float, D: Device>(
        &self,
        saved: &RouterSaved<T, D>,
        scales: RouterScales<'_>,
    ) -> f64 {
        let products = saved.prob_sums.iter().zip(scales.model_counts).map(|(p, &count)| p * count as f64);
        model_factor(self.config.num_experts, saved.unit.micro_batch().1, scales) * products.sum::<f64>()
    }

    /// The gradient of the objective by the logits, `[n, E]`, in their type.
    fn dlogits<R: Float<Acc = R>, D: Routing<R>>(
        &self,
        device: &D,
        dweights: View<'_, R, D>,
        experts: View<'_, i32, D>,
        logits: &Tensor<R, D>,
        losses: &Losses,
    ) -> Result<Tensor<R, D>, Error> {
        let RouterConfig { num_experts, scoring, .. } = self.config;
        let Losses { aux, z } = losses;
        let aux = Tensor::<R, D>::from_f64(device, aux.len() / num_experts, num_experts, aux)?;
        let mut dlogits = Tensor::<R, D>::uninit(device, logits.shape()[0], num_experts)?;
        device.route_backward(
            dlogits.view_mut()?,
            dweights,
            experts,
            logits.view(),
            &scoring,
            aux.view(),
            *z,
        )?;
        Ok(dlogits)
    }

    /// The derivative of the objective by a token's probabilities, one row for each sequence: the sum over the losses of
    /// `c·E·C_e/(n_u·K·T²)`.
    fn aux_gradient(&self, unit: &UnitCounts, scales: RouterScales<'_>) -> Vec<f64> {
        let RouterConfig { num_experts, top_k, .. } = self.config;
        let factor = |coef: f64, units: u64, tokens: i64| {
            let divisor = units as f64 * top_k as f64 * (tokens as f64).powi(2);
            if tokens == 0 { 0.0 } else { coef * num_experts as f64 / divisor }
        };
        let (all, tokens) = unit.micro_batch();
        let of_micro_batch = factor(self.config.aux_loss_coef, scales.micro_batches, tokens);
        let of_step = factor(self.config.global_aux_loss_coef, 1, scales.valid_tokens as i64);
        // What is the same for all sequences.
        let mut shared: Vec<f64> = all.iter().map(|&count| of_micro_batch * count as f64).collect();
        shared.iter_mut().zip(scales.step_counts).for_each(|(sum, &count)| *sum += of_step * count as f64);
        let of_model = self.config.model_aux_loss_coef * model_factor(num_experts, tokens, scales)
            / match scales.model_unit {
                ModelUnit::MicroBatch => scales.micro_batches as f64,
                ModelUnit::Step => 1.0,
            };
        shared.iter_mut().zip(scales.model_counts).for_each(|(sum, &count)| *sum += of_model * count as f64);
        let rows = unit.sequences().flat_map(|(own, tokens)| {
            let of_sequence = factor(self.config.sequence_aux_loss_coef, scales.sequences, tokens);
            shared.iter().zip(own).map(move |(shared, &own)| shared + of_sequence * own as f64)
        });
        rows.collect()
    }
}

/// `E/(M·T)²` for the unit of a micro-batch of `tokens` tokens, 0 without tokens or layers.
fn model_factor(num_experts: usize, tokens: i64, scales: RouterScales<'_>) -> f64 {
    let tokens = match scales.model_unit {
        ModelUnit::MicroBatch => tokens,
        ModelUnit::Step => scales.valid_tokens as i64,
    };
    let divisor = (scales.moe_layers as f64 * tokens as f64).powi(2);
    if divisor == 0.0 { 0.0 } else { num_experts as f64 / divisor }
}
