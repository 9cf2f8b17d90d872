use crate::{Device, Float, Result, View, ViewMut};

/// How logits become scores and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreFunction {
    /// Top-k of the logits, then softmax over the chosen (Mixtral).
    SoftmaxPost,
    /// Softmax over all experts, then top-k.
    SoftmaxPre {
        /// Divide the chosen by their sum (`norm_topk_prob`).
        normalize: bool,
    },
}

/// Router scores, choice and sorting. `A` is the router's type, an accumulation type.
pub trait Routing<A: Float>: Device {
    /// Chooses `K` experts for each of `n` tokens from `logits: [n, E]`.
    ///
    /// `experts: [n, K]` in descending order of score, ties to the smaller id; `weights: [n, K]`;
    /// `probs: [n, E]` the softmax over all experts (auxiliary loss, backward); `lse: [1, n]` the log-sum-exp of
    /// the logits. [`Error::NotANumber`](crate::Error::NotANumber) names the first token with a NaN.
    fn route(
        &self,
        weights: ViewMut<'_, A, Self>,
        experts: ViewMut<'_, i32, Self>,
        probs: ViewMut<'_, A, Self>,
        lse: ViewMut<'_, A, Self>,
        logits: View<'_, A, Self>,
        score: ScoreFunction,
    ) -> Result<()>;

    /// Overwrites `dlogits: [n, E]` with the gradient through the weights (`dweights: [n, K]`), plus that of the
    /// auxiliary loss, whose derivative by `probs[i, e]` is `aux[e]` (`[1, E]`) for every token, plus that of the
    /// z-loss, `z · lse[i]²` per token.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn route_backward(
        &self,
        dlogits: ViewMut<'_, A, Self>,
        dweights: View<'_, A, Self>,
        weights: View<'_, A, Self>,
        experts: View<'_, i32, Self>,
        probs: View<'_, A, Self>,
        lse: View<'_, A, Self>,
        score: ScoreFunction,
        aux: View<'_, A, Self>,
        z: f64,
    ) -> Result<()>;

    /// Stable counting sort of the `n · K` choices by expert.
    ///
    /// `order: [1, n · K]`: the flat index `i · K + k` of the j-th choice in expert order; `position: [n, K]`: its
    /// inverse; `offsets: [1, E + 1]`: the first sorted position of each expert. Negative experts are routed
    /// nowhere: their `position` is −1 and the tail of `order` from `offsets[E]` on is −1.
    fn sort_by_expert(
        &self,
        order: ViewMut<'_, i32, Self>,
        position: ViewMut<'_, i32, Self>,
        offsets: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
    ) -> Result<()>;
}
