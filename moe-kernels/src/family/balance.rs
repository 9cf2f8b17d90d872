use crate::{Device, Float, Result, View, ViewMut};

/// What [`Balance::balance_sums`] reads of a micro-batch of `S` sequences.
#[derive(Debug)]
pub struct BalanceInput<'a, A: Float, D: Device> {
    /// `[S, E + 1]`: counts of this rank's tokens.
    pub own: View<'a, i64, D>,
    /// `[S, E + 1]`: counts of the tokens of all ranks that share the micro-batch.
    pub unit: View<'a, i64, D>,
    /// `[1, E + 1]`: counts of the experts chosen, where the losses count others.
    pub chosen: Option<View<'a, i64, D>>,
    /// `[S, E]`: sums over this rank's tokens of their share of the scores.
    pub probs: View<'a, A, D>,
    /// Choices of each token, K.
    pub top_k: usize,
}

/// What a load-balancing loss takes of the choices of other micro-batches, or of other layers.
#[derive(Debug)]
pub struct BalanceTerm<'a, D: Device> {
    /// `[1, E]`.
    pub counts: View<'a, i64, D>,
    /// Multiplies them.
    pub factor: f64,
    /// Whether the factor is divided by the square of the micro-batch's tokens.
    pub per_token: bool,
}

impl<D: Device> Clone for BalanceTerm<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for BalanceTerm<'_, D> {}

/// Of what [`Balance::balance_gradient`] is the sum.
#[derive(Debug)]
pub struct BalanceTerms<'a, D: Device> {
    /// `[S, E + 1]`: counts of the tokens of all ranks that share the micro-batch.
    pub unit: View<'a, i64, D>,
    /// Multiplies the choices in the whole micro-batch, by the square of its tokens.
    pub micro_batch: f64,
    /// Multiplies the choices in each sequence, by the square of its tokens.
    pub sequence: f64,
    /// The choices of a whole step.
    pub step: Option<BalanceTerm<'a, D>>,
    /// The choices of all layers.
    pub model: Option<BalanceTerm<'a, D>>,
}

/// How often experts are chosen, and the load-balancing losses (arXiv 2101.03961) made of that, without a read by the host. `A` is
/// the router's type, an accumulation type; all else is in f64, sums in a fixed order.
///
/// Counts are matrices of 64-bit integers `[S, E + 1]`, for each of `S` sequences a row of how often each of `E` experts was chosen
/// and of the number of tokens. What is divided by the square of no tokens is 0.
pub trait Balance<A: Float>: Device {
    /// Adds the choices `experts: [n, K]` to `counts: [S, E + 1]`; token `i` belongs to sequence `i mod S`. Negative experts
    /// count nowhere, and a token that has no other is none.
    fn count_choices(&self, counts: ViewMut<'_, i64, Self>, experts: View<'_, i32, Self>) -> Result<()>;

    /// Adds to `dropped: [1, 1]` how many of the choices `experts: [n, K]` are negative in `kept: [n, K]` and were not before.
    fn count_dropped(
        &self,
        dropped: ViewMut<'_, f64, Self>,
        experts: View<'_, i32, Self>,
        kept: View<'_, i32, Self>,
    ) -> Result<()>;

    /// `sums[e] += Σ_s counts[s, e]`. `sums: [1, E]`, `counts: [S, E + 1]`.
    fn sum_counts(&self, sums: ViewMut<'_, i64, Self>, counts: View<'_, i64, Self>) -> Result<()>;

    /// Adds to `sums: [1, 3E + 2]`: of each expert, how often this rank's tokens chose it, how often the losses count it, and its
    /// share of the scores (`P_e`); then this rank's part of the micro-batch's load-balancing loss, `E/(K·T²) Σ_e C_e·P_e` with
    /// choices and tokens `C` and `T` of `unit`, and the sum over sequences of the same with each sequence's own.
    fn balance_sums(&self, sums: ViewMut<'_, f64, Self>, input: BalanceInput<'_, A, Self>) -> Result<()>;

    /// Overwrites `gradient: [S, E]` with the derivative of the losses by a token's shares of the scores, for each sequence: the
    /// sum of the terms.
    fn balance_gradient(&self, gradient: ViewMut<'_, A, Self>, terms: BalanceTerms<'_, Self>) -> Result<()>;

    /// `sum += factor · Σ_e C_e Σ_s probs[s, e]` for the counts `C` of `term`, whose factor may be per token of `unit`. `sum: [1, 1]`,
    /// `probs: [S, E]`, `unit: [S, E + 1]`.
    fn balance_dot(
        &self,
        sum: ViewMut<'_, f64, Self>,
        probs: View<'_, A, Self>,
        unit: View<'_, i64, Self>,
        term: BalanceTerm<'_, Self>,
    ) -> Result<()>;
}
