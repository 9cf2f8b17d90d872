//! The router: which experts a token goes to, with which weight, and what that costs the objective.

mod backward;
mod forward;
mod sinkhorn;
mod stats;
mod types;

use moe_kernels::family::{self, Balance, ExpertGroups, Scoring};
use moe_kernels::{DType, Device, Element, Float, Tensor, View, ViewMut};

use crate::{Error, Routing};

pub use sinkhorn::{Sinkhorn, SumOverUnit};
pub use stats::{RouterStats, RouterSum, RouterSums};

/// What a router computes. Names in brackets are those of a Hugging Face `config.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterConfig {
    /// Experts of the layer, E (`num_local_experts`).
    pub num_experts: usize,
    /// Experts that each token chooses, K (`num_experts_per_tok`).
    pub top_k: usize,
    /// From logits to choices and weights.
    pub scoring: Scoring,
    /// Whether all that is computed, from logits to losses, is in f64 even where tensors accumulate in less.
    pub in_f64: bool,
    /// Coefficient of the load-balancing loss of each micro-batch (`router_aux_loss_coef`); 0 without.
    pub aux_loss_coef: f64,
    /// Coefficient of the load-balancing loss of each sequence; 0 without.
    pub sequence_aux_loss_coef: f64,
    /// Coefficient of the load-balancing loss of the whole step; 0 without.
    pub global_aux_loss_coef: f64,
    /// Coefficient of the load-balancing loss of a micro-batch over all layers, as transformers has it; 0 without.
    pub model_aux_loss_coef: f64,
    /// Coefficient of the z-loss (arXiv 2202.08906); 0 without.
    pub z_loss_coef: f64,
}

/// Top-k router by softmax or other scores, computed in the accumulation type or in f64, with load-balancing losses (arXiv
/// 2101.03961) of each micro-batch, of each sequence and of the whole step, and the z-loss.
///
/// The losses are part of the objective, and [`backward`](Router::backward) adds their exact gradients; no factor of
/// the mapping (1/DP, CP, TP) is among them.
///
/// - Load balancing, per layer: `(1/n_u) Σ_u E/(K·T_u²) Σ_e C_ue·P_ue` over the `n_u` micro-batches (or sequences, or the
///   one whole) `u` of the step, each with `T_u` tokens, and `P_ue` the sum of their shares of the scores over all experts (a softmax,
///   or sigmoids divided by their sum); 1 when balanced. `C_ue` counts the tokens with expert `e` among their K best
///   *without* bias and groups: what the scores themselves say. Tokens are spread over the ranks of a TP×CP group, hence
///   the sum that `forward` asks for; the counts of a whole step are the caller's to add up
///   ([`RouterStats::plain_counts`]) and to give to `backward`.
/// - Over all layers, in place of that: `(1/n_u) Σ_u E Σ_e C_ue·P_ue/(M·T_u)²` over micro-batches `u` (or the whole step as
///   one [`ModelUnit`]), with `C` and `P` summed over the `M` layers, as transformers' `load_balancing_loss_func`; the choices of the other layers are the caller's to
///   bring. Balanced it is `K`.
/// - z-loss, per layer: `(1/T_v) Σ_i logsumexp(logits_i)²` over the `T_v` tokens of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    config: RouterConfig,
}

/// Which tokens the load-balancing loss over all layers takes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelUnit {
    /// Those of each micro-batch: the loss is the mean over them.
    #[default]
    MicroBatch,
    /// Those of the whole step, as transformers takes those of a batch.
    Step,
}

/// What the gradients of the losses take from the step as a whole; the same on all ranks.
#[derive(Debug)]
pub struct RouterScales<'a, D: Device> {
    /// Micro-batches of the step over all data-parallel ranks.
    pub micro_batches: u64,
    /// Sequences of the step over all data-parallel ranks.
    pub sequences: u64,
    /// Tokens of the step that are no padding, `T_v`.
    pub valid_tokens: u64,
    /// `[1, E]`: sum of [`RouterStats::plain_counts`] over the micro-batches of the step and all ranks of the stage; none where
    /// the whole step has no load-balancing loss.
    pub step_counts: Option<View<'a, i64, D>>,
    /// `[1, E]`: choices of each expert in the `model_unit` over all layers, sums of [`RouterSaved::add_choices`]; none where the
    /// layers have no load-balancing loss together.
    pub model_counts: Option<View<'a, i64, D>>,
    /// What that loss takes together.
    pub model_unit: ModelUnit,
    /// Layers with experts, M.
    pub moe_layers: u64,
}

impl<D: Device> Clone for RouterScales<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for RouterScales<'_, D> {}

/// What [`Router::forward`] routes, and by what.
///
/// Rows are sequence-major: token `i` belongs to sequence `i mod sequences` of the micro-batch.
#[derive(Debug)]
pub struct RouterInput<'a, T: Float, D: Device> {
    /// This rank's tokens, `[n, H]`.
    pub x: &'a Tensor<T, D>,
    /// `[E, H]`.
    pub weight: View<'a, T, D>,
    /// `[1, E]`, added to scores, or to the logits of a softmax, where they are compared, not where they become weights; none
    /// unless given. A softmax takes none where there are groups.
    pub bias: Option<View<'a, T::Acc, D>>,
    /// Sequences of the micro-batch; 1 unless given.
    pub sequences: usize,
    /// Noise on the tokens; none unless given.
    pub jitter: Option<Jitter<'a, D>>,
    /// `[n, K]`: the choice, where it is not the router's own (forced or replayed); different experts for each token. Weights
    /// are made of the present scores, and losses count what these would choose.
    pub given: Option<&'a Tensor<i32, D>>,
    /// `[1, n]`: 0 for padding, which is routed nowhere and is no token to any loss or count; all are valid unless given.
    pub valid: Option<View<'a, i32, D>>,
    /// A choice that spreads tokens evenly, unless it is given; none unless given.
    pub sinkhorn: Option<Sinkhorn<'a>>,
    /// Whether [`Margins`] are asked for; not unless given.
    pub margins: bool,
}

/// Noise on what a router sees (not on what its experts see): each element of a token is multiplied by a number between
/// `1 − epsilon` and `1 + epsilon` (arXiv 2101.03961), the same one whichever rank holds the token.
#[derive(Debug, Clone, Copy)]
pub struct Jitter<'a, D: Device> {
    /// How far the factors are from 1 at most.
    pub epsilon: f64,
    /// Key of the numbers.
    pub key: u64,
    /// `[1, n]`: what tells the tokens apart.
    pub tokens: &'a Tensor<i64, D>,
}

impl<D: Device> Jitter<'_, D> {
    /// Multiplies the rows of `x: [n, H]`, tokens or their gradients.
    fn apply<R: Float<Acc = R>>(&self, device: &D, x: &mut Tensor<R, D>) -> Result<(), Error>
    where
        D: family::Routing<R>,
    {
        Ok(device.jitter(x.view_mut()?, self.tokens.view(), self.key, self.epsilon)?)
    }
}

impl<'a, T: Float, D: Device> RouterInput<'a, T, D> {
    /// Tokens of one sequence, by the weight alone.
    pub fn new(x: &'a Tensor<T, D>, weight: View<'a, T, D>) -> Self {
        RouterInput {
            x,
            weight,
            bias: None,
            sequences: 1,
            jitter: None,
            given: None,
            sinkhorn: None,
            valid: None,
            margins: false,
        }
    }
}

/// A routing on a device: `experts: [tokens, top_k]`, `weights: [tokens, top_k]`.
pub type RoutingOn<T, D> = Routing<Tensor<i32, D>, Tensor<<T as Float>::Acc, D>>;

/// If asked for, the [margin](family::RouteOutput::margins) of each of this rank's tokens: the least by which the choice, and
/// that which the load-balancing losses count, stand. Scores of a [`Sinkhorn`] choice are `ln(d_e·x_ie)`.
pub type Margins = Option<Vec<f64>>;

/// What [`Router::forward`] returns: for the dispatcher, and for the backward pass.
pub type Routed<T, D> = (RoutingOn<T, D>, RouterSaved<T, D>, Margins);

/// What the router keeps for its backward pass, besides its input.
#[derive(Debug, Clone)]
pub struct RouterSaved<T: Float, D: Device> {
    /// `[n, K]`.
    experts: Tensor<i32, D>,
    scores: Scores<T, D>,
    /// `[sequences, E + 1]`: what the load-balancing losses count of the micro-batch, on all its ranks.
    unit: Tensor<i64, D>,
    /// The same of this rank's tokens, where the whole step has a load-balancing loss.
    own: Option<Tensor<i64, D>>,
    /// Whether some tokens may be padding.
    padded: bool,
}

impl<T: Float, D: Balance<T::Acc>> RouterSaved<T, D> {
    /// Adds to `sums: [1, E]` how often each expert was among the K best of the tokens of the micro-batch, on all its ranks: what
    /// the load-balancing losses count.
    ///
    /// # Errors
    /// `sums` has another shape.
    pub fn add_choices(&self, device: &D, sums: ViewMut<'_, i64, D>) -> Result<(), Error> {
        Ok(Balance::<T::Acc>::sum_counts(device, sums, self.unit.view())?)
    }

    /// How often each expert was among the K best of this rank's tokens, `[1, E]`; none without a load-balancing loss of the
    /// whole step.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn own_choices(&self, device: &D) -> Result<Option<Tensor<i64, D>>, Error> {
        let Some(own) = &self.own else { return Ok(None) };
        let mut sums = Tensor::zeros(device, 1, own.shape()[1] - 1)?;
        Balance::<T::Acc>::sum_counts(device, sums.view_mut()?, own.view())?;
        Ok(Some(sums))
    }
}

/// What was computed in the router's type.
#[derive(Debug, Clone)]
enum Scores<T: Float, D: Device> {
    Acc(ScoresIn<T::Acc, D>),
    F64(ScoresIn<f64, D>),
}

#[derive(Debug, Clone)]
struct ScoresIn<R: Float, D: Device> {
    /// `[n, E]`.
    logits: Tensor<R, D>,
    /// `[sequences, E]`: sums over this rank's tokens of their shares of the scores, where the layers have a load-balancing loss
    /// together.
    probs: Option<Tensor<R, D>>,
}

impl Router {
    /// A router.
    ///
    /// # Errors
    /// [`Error::Router`] unless `1 ≤ top_k ≤ num_experts`, groups divide the experts and keep at least `top_k` of them,
    /// and all numbers are finite.
    pub fn new(config: RouterConfig) -> Result<Self, Error> {
        let RouterConfig { num_experts, top_k, scoring, .. } = config;
        if top_k == 0 || top_k > num_experts {
            let what = format!("top_k ({top_k}) must lie between 1 and num_experts ({num_experts})");
            return Err(Error::Router { what });
        }
        if let Some(ExpertGroups { count, kept, score_top_k }) = scoring.groups {
            let size = num_experts.checked_div(count).unwrap_or(0);
            let divides = count > 0 && num_experts.is_multiple_of(count);
            if !divides || kept > count || top_k > kept * size || !(1..=size).contains(&score_top_k) {
                let what = format!(
                    "{top_k} of {num_experts} experts cannot be chosen from {kept} of {count} groups that their \
                     {score_top_k} best stand for"
                );
                return Err(Error::Router { what });
            }
        }
        for (name, number) in [
            ("aux_loss_coef", config.aux_loss_coef),
            ("sequence_aux_loss_coef", config.sequence_aux_loss_coef),
            ("global_aux_loss_coef", config.global_aux_loss_coef),
            ("model_aux_loss_coef", config.model_aux_loss_coef),
            ("z_loss_coef", config.z_loss_coef),
            ("scale", scoring.scale),
        ] {
            if !number.is_finite() {
                return Err(Error::Router { what: format!("{name} is {number}") });
            }
        }
        Ok(Router { config })
    }

    /// Whether it computes in f64 what tensors of `T` accumulate in less.
    fn widens<T: Float>(&self) -> bool {
        self.config.in_f64 && <T::Acc as Element>::DTYPE != DType::F64
    }

    /// What it computes.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }
}
