//! A choice that spreads tokens evenly: Sinkhorn's iteration on the whole micro-batch.

use std::fmt;

use moe_kernels::family::{RouteInput, RouteOutput, Routing, ScoreFunction};
use moe_kernels::{Float, Tensor, View};

use super::Router;
use crate::Error;

/// A sum of numbers over the ranks that share the micro-batch, the same length as it was given.
pub type SumOverUnit<'a> = &'a dyn Fn(&[f64]) -> Result<Vec<f64>, Error>;

/// Choose by optimal transport instead of by score (S-BASE, arXiv 2202.01169): with `x = exp(logits)` over all `T` valid tokens of
/// the micro-batch and starting from `d_e = 1`, repeat `iterations` times:
///
/// `r_i = 1 / (T·Σ_e d_e·x_ie)`, then `d_e = 1 / (E·Σ_i r_i·x_ie)`;
///
/// a token's experts are those of the largest `d_e·x_ie`; with `T = 1`, where all would be equal, of the largest `x_ie`. The
/// number of iterations is fixed: to stop at a tolerance would
/// make the choice depend on rounding. Weights are those of the scores. It is for training alone.
#[derive(Clone, Copy)]
pub struct Sinkhorn<'a> {
    /// Iterations, at least 1.
    pub iterations: usize,
    /// Called once in each iteration, also by a rank without tokens.
    pub sum_over_unit: SumOverUnit<'a>,
}

impl fmt::Debug for Sinkhorn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sinkhorn").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

/// Experts, `[n, K]`, and if asked for by how much each token's choice stands.
pub(super) type Spread<D> = (Tensor<i32, D>, Option<Vec<f64>>);

impl Router {
    /// The choice for the rank's `logits: [n, E]`.
    ///
    /// With `c = ln d`, the probabilities `p_ie` of a softmax of `logits + c` are `T·r_i·d_e·x_ie`: an iteration is
    /// `c_e −= ln(E/T · Σ_i p_ie)`, in which nothing overflows.
    pub(super) fn sinkhorn<R: Float<Acc = R>, D: Routing<R>>(
        &self,
        device: &D,
        logits: &Tensor<R, D>,
        valid: Option<View<'_, i32, D>>,
        sinkhorn: Sinkhorn<'_>,
        margins: bool,
    ) -> Result<Spread<D>, Error> {
        let Sinkhorn { iterations, sum_over_unit } = sinkhorn;
        let ([tokens, num_experts], top_k) = (logits.shape(), self.config.top_k);
        if self.config.scoring.groups.is_some() || iterations == 0 {
            let what = format!("a Sinkhorn choice with groups of experts or {iterations} iterations");
            return Err(Error::Router { what });
        }
        let mut offsets = vec![0.0; num_experts];
        for _ in 0..iterations {
            let bias = Tensor::<R, D>::from_f64(device, 1, num_experts, &offsets)?;
            let mut sums = Tensor::<f64, D>::uninit(device, 1, num_experts)?;
            device.softmax_sums(sums.view_mut()?, logits.view(), bias.view(), valid)?;
            let sums = sum_over_unit(&sums.to_vec(device)?)?;
            if sums.len() != num_experts {
                let what = format!("the sum of {num_experts} numbers came back as {}", sums.len());
                return Err(Error::Router { what });
            }
            // Each token's probabilities sum to 1. A token alone, to which all experts would soon be worth the same so that
            // rounding would choose, chooses by score.
            let all: f64 = sums.iter().sum();
            if all > 1.5 {
                for (offset, sum) in offsets.iter_mut().zip(sums) {
                    *offset -= (num_experts as f64 * sum.max(f64::MIN_POSITIVE) / all).ln();
                }
            }
        }
        let bias = Tensor::<R, D>::from_f64(device, 1, num_experts, &offsets)?;
        let mut experts = Tensor::uninit(device, tokens, top_k)?;
        let mut weights = Tensor::<R, D>::uninit(device, tokens, top_k)?;
        let mut probs = Tensor::<R, D>::uninit(device, tokens, num_experts)?;
        let mut lse = Tensor::<R, D>::uninit(device, 1, tokens)?;
        let mut margins = margins.then(|| Tensor::<R, D>::uninit(device, 1, tokens)).transpose()?;
        let out = RouteOutput {
            weights: weights.view_mut()?,
            experts: experts.view_mut()?,
            unbiased: None,
            probs: probs.view_mut()?,
            lse: lse.view_mut()?,
            margins: margins.as_mut().map(Tensor::view_mut).transpose()?,
        };
        // The order of `logits + c`; the weights are not used.
        let input = RouteInput { bias: Some(bias.view()), valid, ..RouteInput::new(logits.view()) };
        device.route(out, input, &ScoreFunction::SoftmaxPost.into())?;
        Ok((experts, margins.map(|margins| margins.to_f64(device)).transpose()?))
    }
}
