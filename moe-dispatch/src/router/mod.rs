//! The router: which experts a token goes to, with which weight, and what that costs the objective.

mod backward;
mod forward;

use moe_kernels::family::ScoreFunction;
use moe_kernels::{Device, Float, Tensor};

use crate::{Error, Routing};

/// What a router computes. Names in brackets are those of a Hugging Face `config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterConfig {
    /// Experts of the layer, E (`num_local_experts`).
    pub num_experts: usize,
    /// Experts that each token chooses, K (`num_experts_per_tok`).
    pub top_k: usize,
    /// From logits to weights.
    pub score: ScoreFunction,
    /// Coefficient of the load-balancing loss (`router_aux_loss_coef`); 0 without.
    pub aux_loss_coef: f64,
    /// Coefficient of the z-loss (arXiv 2202.08906); 0 without.
    pub z_loss_coef: f64,
}

/// Softmax top-k router with the load-balancing loss of each micro-batch (arXiv 2101.03961) and the z-loss, scored
/// in the accumulation type.
///
/// The losses are part of the objective, and [`backward`](Router::backward) adds their exact gradients; no factor of
/// the mapping (1/DP, CP, TP) is among them.
///
/// - Load balancing, per layer: `(1/n_u) Σ_u E/(K·T_u²) Σ_e C_ue·P_ue` over the `n_u` micro-batches `u` of the step,
///   each with `T_u` tokens, `C_ue` of which chose expert `e`, and `P_ue` the sum of their softmax over all experts;
///   1 when balanced. A micro-batch's tokens are spread over the ranks of its TP×CP group, hence the sum that
///   `forward` asks for.
/// - z-loss, per layer: `(1/T_v) Σ_i logsumexp(logits_i)²` over the `T_v` tokens of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    config: RouterConfig,
}

/// Sizes of the step that the gradients of the losses are divided by; the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterScales {
    /// Micro-batches of the step over all data-parallel ranks, `n_u`.
    pub micro_batches: u64,
    /// Tokens of the step that are no padding, `T_v`.
    pub valid_tokens: u64,
}

/// A routing on a device: `experts: [tokens, top_k]`, `weights: [tokens, top_k]`.
pub type RoutingOn<T, D> = Routing<Tensor<i32, D>, Tensor<<T as Float>::Acc, D>>;

/// What [`Router::forward`] returns: for the dispatcher, for the backward pass, for the metrics.
pub type Routed<T, D> = (RoutingOn<T, D>, RouterSaved<T, D>, RouterStats);

/// What the router keeps for its backward pass.
#[derive(Debug, Clone)]
pub struct RouterSaved<T: Float, D: Device> {
    /// Its input, `[n, H]`.
    x: Tensor<T, D>,
    /// `[n, K]`.
    experts: Tensor<i32, D>,
    /// `[n, K]`.
    weights: Tensor<T::Acc, D>,
    /// Softmax over all experts, `[n, E]`.
    probs: Tensor<T::Acc, D>,
    /// Log-sum-exp of the logits, `[1, n]`.
    lse: Tensor<T::Acc, D>,
    /// Choices of each expert in the whole micro-batch.
    unit_counts: Vec<i64>,
    /// Tokens of the whole micro-batch.
    unit_tokens: i64,
}

/// Numbers for the metrics of one layer and micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterStats {
    /// How often this rank's tokens chose each expert.
    pub expert_counts: Vec<i64>,
    /// This rank's part of the micro-batch's load-balancing loss, `E/(K·T²) Σ_e C_e·P_e` with `P_e` over its own
    /// tokens, without coefficient. The loss of the step is the sum over all ranks and micro-batches, divided by
    /// the number of micro-batches.
    pub aux_loss: f64,
    /// `Σ logsumexp²` over this rank's tokens. The z-loss of the step is the sum over all ranks and micro-batches,
    /// divided by the number of tokens.
    pub z_loss_sum: f64,
}

impl Router {
    /// A router.
    ///
    /// # Errors
    /// [`Error::Router`] unless `1 ≤ top_k ≤ num_experts` and the coefficients are finite.
    pub fn new(config: RouterConfig) -> Result<Self, Error> {
        let RouterConfig { num_experts, top_k, aux_loss_coef, z_loss_coef, .. } = config;
        if top_k == 0 || top_k > num_experts {
            let what = format!("top_k ({top_k}) must lie between 1 and num_experts ({num_experts})");
            return Err(Error::Router { what });
        }
        for (name, coef) in [("aux_loss_coef", aux_loss_coef), ("z_loss_coef", z_loss_coef)] {
            if !coef.is_finite() {
                return Err(Error::Router { what: format!("{name} is {coef}") });
            }
        }
        Ok(Router { config })
    }

    /// What it computes.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }
}
