use moe_kernels::family::{self, Balance, BalanceInput, Gemm, Op, Reduce, RouteInput, RouteOutput};
use moe_kernels::{Backend, Device, Float, Tensor, View};

use super::types::{copied, narrowed_f64, widened, widened_f64};
use super::{
    Margins, Routed, Router, RouterConfig, RouterInput, RouterSaved, RouterSum, Scores, ScoresIn, Sinkhorn,
};
use crate::{Error, Routing, Shapes};

/// What was chosen, and what that says about the rank's tokens.
struct Chosen<R: Float, D: Device> {
    /// `[n, K]`.
    experts: Tensor<i32, D>,
    /// `[n, K]`.
    weights: Tensor<R, D>,
    scores: ScoresIn<R, D>,
    counts: Counts<D>,
    margins: Margins,
}

/// The choices that the losses count, `[sequences, E + 1]`.
struct Counts<D: Device> {
    own: Tensor<i64, D>,
    unit: Tensor<i64, D>,
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
    /// Routes the tokens of this rank, and adds to `sums`, if there are any.
    ///
    /// `sum_over_unit` adds up counts, `[sequences, E + 1]`, over the ranks that share the micro-batch (the attention
    /// TP×CP group), and is called exactly once, also for `n = 0`; it is `Ok` if there is but one. The host waits for the device
    /// only where margins or a [`Sinkhorn`] choice are asked for.
    ///
    /// # Errors
    /// [`moe_kernels::Error::NotANumber`] names the first token whose logits have no finite log-sum-exp (from a device whose
    /// calls do not wait, the next read returns it); [`Error::Router`] if `sequences` does not divide the tokens; errors of the device and of
    /// `sum_over_unit`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        input: RouterInput<'_, T, D>,
        sums: Option<RouterSum<'_, D>>,
        sum_over_unit: impl FnOnce(Tensor<i64, D>) -> Result<Tensor<i64, D>, Error>,
    ) -> Result<Routed<T, D>, Error> {
        let RouterInput { x, weight, bias, sequences, jitter, given, sinkhorn, valid, margins } = input;
        let (how, padded) = (How { given, sinkhorn, valid, sequences, margins }, valid.is_some());
        let [tokens, _] = x.shape();
        let RouterConfig { num_experts, top_k, .. } = self.config;
        if sequences == 0 || !tokens.is_multiple_of(sequences) {
            return Err(Error::Router {
                what: format!("{tokens} tokens are not {sequences} equal sequences"),
            });
        }

        let (experts, weights, scores, counts, margins) = if self.widens::<T>() {
            let (mut x, weight) = (widened_f64(device, x.view())?, widened_f64(device, weight)?);
            if let Some(jitter) = &jitter {
                jitter.apply(device, &mut x)?;
            }
            let mut logits = Tensor::<f64, D>::zeros(device, tokens, num_experts)?;
            Gemm::<f64>::gemm_acc(device, logits.view_mut()?, x.view(), Op::N, weight.view(), Op::T)?;
            let bias = bias.map(|bias| widened_f64::<T::Acc, D>(device, bias)).transpose()?;
            let bias = bias.as_ref().map(Tensor::view);
            let Chosen { experts, weights, scores, counts, margins } =
                self.choose(device, logits, bias, how, sums, sum_over_unit)?;
            (experts, narrowed_f64::<T::Acc, D>(device, &weights)?, Scores::F64(scores), counts, margins)
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
            let Chosen { experts, weights, scores, counts, margins } =
                self.choose(device, logits, bias, how, sums, sum_over_unit)?;
            (experts, weights, Scores::Acc(scores), counts, margins)
        };
        let own = (self.config.global_aux_loss_coef != 0.0).then_some(counts.own);
        let routing = Routing { experts: experts.clone(), weights, tokens, top_k, shapes: Shapes::Exact };
        Ok((routing, RouterSaved { experts, scores, unit: counts.unit, own, padded }, margins))
    }

    /// The choice by `logits: [n, E]`, in their type.
    fn choose<R: Float<Acc = R>, D: family::Routing<R> + Reduce<R> + Balance<R>>(
        &self,
        device: &D,
        logits: Tensor<R, D>,
        bias: Option<View<'_, R, D>>,
        how: How<'_, D>,
        sums: Option<RouterSum<'_, D>>,
        sum_over_unit: impl FnOnce(Tensor<i64, D>) -> Result<Tensor<i64, D>, Error>,
    ) -> Result<Chosen<R, D>, Error> {
        let RouterConfig { num_experts, top_k, scoring, .. } = self.config;
        let How { given, sinkhorn, valid, sequences, margins } = how;
        let [tokens, _] = logits.shape();
        let spread = match (given, sinkhorn) {
            (None, Some(sinkhorn)) => Some(self.sinkhorn(device, &logits, valid, sinkhorn, margins)?),
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

        let counts = |experts: &Tensor<i32, D>, sequences| -> Result<_, Error> {
            let mut counts = Tensor::<i64, D>::zeros(device, sequences, num_experts + 1)?;
            Balance::<R>::count_choices(device, counts.view_mut()?, experts.view())?;
            Ok(counts)
        };
        let own = counts(unbiased.as_ref().unwrap_or(&experts), sequences)?;
        let unit = sum_over_unit(own.clone())?;
        if unit.shape() != own.shape() {
            let (expected, got) = (own.shape(), unit.shape());
            let what = format!("the sum of {expected:?} counts came back as {got:?}");
            return Err(Error::Router { what });
        }
        // One row of sums per sequence: the rows of a sequence-major matrix side by side.
        let probs = probs.reshape(tokens / sequences, sequences * num_experts)?;
        let probs = column_sums(device, &probs)?.reshape(sequences, num_experts)?;
        if let Some(mut sums) = sums {
            let chosen = unbiased.is_some().then(|| counts(&experts, 1)).transpose()?;
            let input = BalanceInput {
                own: own.view(),
                unit: unit.view(),
                chosen: chosen.as_ref().map(Tensor::view),
                probs: probs.view(),
                top_k,
            };
            device.balance_sums(sums.balance()?, input)?;
            device.dot(sums.z_loss()?, lse.view(), lse.view())?;
        }
        let mut margins = margins.map(|margins| margins.to_f64(device)).transpose()?;
        if let (Some(margins), Some(of_spread)) = (&mut margins, spread_margins.flatten()) {
            margins.iter_mut().zip(of_spread).for_each(|(margin, of_spread)| *margin = margin.min(of_spread));
        }
        let probs = (self.config.model_aux_loss_coef != 0.0).then_some(probs);
        let (scores, counts) = (ScoresIn { logits, probs }, Counts { own, unit });
        Ok(Chosen { experts, weights, scores, counts, margins })
    }
}

fn column_sums<R: Float<Acc = R>, D: Reduce<R>>(device: &D, x: &Tensor<R, D>) -> Result<Tensor<R, D>, Error> {
    let mut sums = Tensor::<R, D>::uninit(device, 1, x.shape()[1])?;
    device.column_sums(sums.view_mut()?, x.view())?;
    Ok(sums)
}
