use moe_kernels::family::{self, Gemm, Op, Reduce, RouteInput, RouteOutput};
use moe_kernels::{Backend, Device, Float, Tensor, View};

use super::types::{copied, narrowed_f64, widened, widened_f64};
use super::{
    Logits, Routed, Router, RouterConfig, RouterInput, RouterSaved, RouterStats, Sinkhorn, UnitCounts,
};
use crate::{Error, Routing, Shapes};

/// What was chosen, and what that says about the rank's tokens.
struct Chosen<D: Device> {
    /// `[n, K]`.
    experts: Tensor<i32, D>,
    /// `n · K`: the choices that the losses count.
    counted: Vec<i32>,
    /// What experts were chosen, where that is not what the losses count.
    expert_counts: Option<Vec<i64>>,
    /// `sequences · E`.
    prob_sums: Vec<f64>,
    z_loss_sum: f64,
    /// `n`, if asked for.
    margins: Option<Vec<f64>>,
}

/// How experts are chosen.
struct How<'a, D: Device> {
    given: Option<&'a Tensor<i32, D>>,
    sinkhorn: Option<Sinkhorn<'a>>,
    valid: Option<View<'a, i32, D>>,
    sequences: usize,
    margins: bool,
}

impl Router {
    /// Routes the tokens of this rank.
    ///
    /// `sum_over_unit` adds up `sequences · (E + 1)` counts over the ranks that share the micro-batch (the attention
    /// TP×CP group), and is called exactly once, also for `n = 0`; `|counts| Ok(counts.to_vec())` if there is but one.
    ///
    /// # Errors
    /// [`moe_kernels::Error::NotANumber`] names the first token with a NaN logit; [`Error::Router`] if `sequences` does
    /// not divide the tokens; errors of the device and of `sum_over_unit`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        input: RouterInput<'_, T, D>,
        sum_over_unit: impl FnOnce(&[i64]) -> Result<Vec<i64>, Error>,
    ) -> Result<Routed<T, D>, Error> {
        let RouterInput { x, weight, bias, sequences, jitter, given, sinkhorn, valid, margins } = input;
        let how = How { given, sinkhorn, valid, sequences, margins };
        let [tokens, _] = x.shape();
        let RouterConfig { num_experts, top_k, .. } = self.config;
        if sequences == 0 || !tokens.is_multiple_of(sequences) {
            return Err(Error::Router {
                what: format!("{tokens} tokens are not {sequences} equal sequences"),
            });
        }

        let (logits, weights, chosen) = if self.widens::<T>() {
            let (mut x, weight) = (widened_f64(device, x.view())?, widened_f64(device, weight)?);
            if let Some(jitter) = &jitter {
                jitter.apply(device, &mut x)?;
            }
            let mut logits = Tensor::<f64, D>::zeros(device, tokens, num_experts)?;
            Gemm::<f64>::gemm_acc(device, logits.view_mut()?, x.view(), Op::N, weight.view(), Op::T)?;
            let bias = bias.map(|bias| widened_f64::<T::Acc, D>(device, bias)).transpose()?;
            let bias = bias.as_ref().map(Tensor::view);
            let (weights, chosen) = self.choose(device, &logits, bias, how)?;
            (Logits::F64(logits), narrowed_f64::<T::Acc, D>(device, &weights)?, chosen)
        } else {
            let mut logits = Tensor::<T::Acc, D>::zeros(device, tokens, num_experts)?;
            match &jitter {
                None => Gemm::<T>::gemm_acc(device, logits.view_mut()?, x.view(), Op::N, weight, Op::T)?,
                Some(jitter) => {
                    let mut noisy = copied::<T, D>(device, x.view())?;
                    jitter.apply(device, &mut noisy)?;
                    let mut hold = None;
                    let weight = widened(device, weight, &mut hold)?;
                    let (logits, noisy) = (logits.view_mut()?, noisy.view());
                    Gemm::<T::Acc>::gemm(device, logits, noisy, Op::N, weight, Op::T)?;
                }
            }
            let (weights, chosen) = self.choose(device, &logits, bias, how)?;
            (Logits::Acc(logits), weights, chosen)
        };
        let Chosen { experts, counted, expert_counts, prob_sums, z_loss_sum, margins } = chosen;
        let rows = self.count_by_sequence(&counted, sequences);
        let mut plain_counts = vec![0; num_experts];
        for sequence in rows.chunks_exact(num_experts + 1) {
            plain_counts.iter_mut().zip(sequence).for_each(|(sum, count)| *sum += count);
        }
        let expert_counts = expert_counts.unwrap_or_else(|| plain_counts.clone());
        let expected = rows.len();
        let rows = sum_over_unit(&rows)?;
        if rows.len() != expected {
            let what = format!("the sum of {expected} counts came back as {}", rows.len());
            return Err(Error::Router { what });
        }
        let unit = UnitCounts { rows, num_experts };

        let mut all_probs = vec![0.0; num_experts];
        for sequence in prob_sums.chunks_exact(num_experts) {
            all_probs.iter_mut().zip(sequence).for_each(|(sum, p)| *sum += p);
        }
        let stats = RouterStats {
            aux_loss: self.aux_loss(&prob_sums, &unit),
            sequence_aux_loss: self.sequence_aux_loss(&prob_sums, &unit),
            z_loss_sum,
            expert_counts,
            plain_counts,
            prob_sums: all_probs.clone(),
            margins,
        };
        let routing = Routing { experts: experts.clone(), weights, tokens, top_k, shapes: Shapes::Exact };
        Ok((routing, RouterSaved { experts, logits, unit, prob_sums: all_probs }, stats))
    }

    /// The choice by `logits: [n, E]`, in their type; also its weights, `[n, K]`.
    fn choose<R: Float<Acc = R>, D: family::Routing<R> + Reduce<R>>(
        &self,
        device: &D,
        logits: &Tensor<R, D>,
        bias: Option<View<'_, R, D>>,
        how: How<'_, D>,
    ) -> Result<(Tensor<R, D>, Chosen<D>), Error> {
        let RouterConfig { num_experts, top_k, scoring, .. } = self.config;
        let How { given, sinkhorn, valid, sequences, margins } = how;
        let [tokens, _] = logits.shape();
        let spread = match (given, sinkhorn) {
            (None, Some(sinkhorn)) => Some(self.sinkhorn(device, logits, valid, sinkhorn, margins)?),
            _ => None,
        };
        let (spread, spread_margins) = spread.unzip();
        let given = given.or(spread.as_ref());
        let mut weights = Tensor::uninit(device, tokens, top_k)?;
        let mut experts = Tensor::uninit(device, tokens, top_k)?;
        // Without bias, groups and a given choice the choice itself is what the load-balancing losses count.
        let differs = bias.is_some() || scoring.groups.is_some() || given.is_some();
        let mut unbiased = differs.then(|| Tensor::uninit(device, tokens, top_k)).transpose()?;
        let mut probs = Tensor::uninit(device, tokens, num_experts)?;
        let mut lse = Tensor::uninit(device, 1, tokens)?;
        let mut margins = margins.then(|| Tensor::uninit(device, 1, tokens)).transpose()?;
        let out = RouteOutput {
            weights: weights.view_mut()?,
            experts: experts.view_mut()?,
            unbiased: unbiased.as_mut().map(Tensor::view_mut).transpose()?,
            probs: probs.view_mut()?,
            lse: lse.view_mut()?,
            margins: margins.as_mut().map(Tensor::view_mut).transpose()?,
        };
        let input = RouteInput { logits: logits.view(), bias, given: given.map(Tensor::view), valid };
        device.route(out, input, &scoring)?;

        // One row of sums per sequence: the rows of a sequence-major matrix side by side.
        let probs = probs.reshape(tokens / sequences, sequences * num_experts)?;
        let (prob_sums, z_loss_sum) = (column_sums(device, &probs)?, sum_of_squares(device, &lse)?);
        // All is under way: only the first of these waits for the device.
        let chosen = experts.to_vec(device)?;
        let (prob_sums, z_loss_sum) = (prob_sums.to_f64(device)?, z_loss_sum.to_vec(device)?[0]);
        let (counted, expert_counts) = match unbiased {
            Some(unbiased) => (unbiased.to_vec(device)?, Some(self.count(&chosen))),
            None => (chosen, None),
        };
        let mut margins = margins.map(|margins| margins.to_f64(device)).transpose()?;
        if let (Some(margins), Some(of_spread)) = (&mut margins, spread_margins.flatten()) {
            margins.iter_mut().zip(of_spread).for_each(|(margin, of_spread)| *margin = margin.min(of_spread));
        }
        Ok((weights, Chosen { experts, counted, expert_counts, prob_sums, z_loss_sum, margins }))
    }

    fn count(&self, experts: &[i32]) -> Vec<i64> {
        let mut counts = vec![0; self.config.num_experts];
        // Padding has chosen −1.
        for &expert in experts.iter().filter(|&&expert| expert >= 0) {
            counts[expert as usize] += 1;
        }
        counts
    }

    /// Rows of [`UnitCounts`] for the choices of this rank's tokens.
    fn count_by_sequence(&self, experts: &[i32], sequences: usize) -> Vec<i64> {
        let width = self.config.num_experts + 1;
        let mut rows = vec![0; sequences * width];
        let tokens = experts.chunks_exact(self.config.top_k).enumerate();
        for (i, experts) in tokens.filter(|(_, experts)| experts[0] >= 0) {
            let row = &mut rows[i % sequences * width..][..width];
            row[width - 1] += 1;
            for &expert in experts {
                row[expert as usize] += 1;
            }
        }
        rows
    }

    fn aux_loss(&self, prob_sums: &[f64], unit: &UnitCounts) -> f64 {
        let (counts, tokens) = unit.micro_batch();
        prob_sums.chunks_exact(counts.len()).map(|probs| self.balance(probs, &counts, tokens)).sum()
    }

    fn sequence_aux_loss(&self, prob_sums: &[f64], unit: &UnitCounts) -> f64 {
        let sequences = prob_sums.chunks_exact(self.config.num_experts).zip(unit.sequences());
        sequences.map(|(probs, (counts, tokens))| self.balance(probs, counts, tokens)).sum()
    }

    /// `E/(K·T²) Σ_e C_e·P_e`, 0 without tokens.
    fn balance(&self, probs: &[f64], counts: &[i64], tokens: i64) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let sum: f64 = probs.iter().zip(counts).map(|(p, &c)| p * c as f64).sum();
        sum * self.config.num_experts as f64 / (self.config.top_k as f64 * (tokens as f64).powi(2))
    }
}

fn column_sums<R: Float<Acc = R>, D: Reduce<R>>(device: &D, x: &Tensor<R, D>) -> Result<Tensor<R, D>, Error> {
    let mut sums = Tensor::<R, D>::uninit(device, 1, x.shape()[1])?;
    device.column_sums(sums.view_mut()?, x.view())?;
    Ok(sums)
}

fn sum_of_squares<R: Float, D: Reduce<R>>(device: &D, x: &Tensor<R, D>) -> Result<Tensor<f64, D>, Error> {
    let mut sum = Tensor::<f64, D>::zeros(device, 1, 1)?;
    device.dot(sum.view_mut()?, x.view(), x.view())?;
    Ok(sum)
}
