//! What defines a model: the keys of a Hugging Face `config.json`.

use moe_kernels::family::{GateFunction, RotaryPairs};
use moe_topology::{Attention, Constraints, Mapping};
use serde::{Deserialize, Serialize};

mod flops;
mod latent;
mod rope;
mod routing;
mod sizes;

pub use latent::LatentAttention;
pub use rope::{RopeScaling, RotaryFrequencies, Yarn};
pub use routing::{AuxLoss, AuxLossScope, RouterDType, ScoringFunc};

/// A decoder with experts (Mixtral, arXiv 2401.04088, and what Qwen2-MoE, Qwen3-MoE, GLM-4-MoE and DeepSeek add to it). Fields
/// carry the names of Hugging Face's `MixtralConfig` and of those models' configurations; what has a default in
/// `MixtralConfig` has it here.
///
/// ```
/// use moe_model::config::ModelConfig;
///
/// let config: ModelConfig = serde_json::from_str(
///     r#"{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}"#,
/// )?;
/// config.check()?;
/// assert_eq!(config.head_dim(), 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Distinct tokens, V.
    pub vocab_size: usize,
    /// Width of the residual stream, H.
    pub hidden_size: usize,
    /// Inner width of dense layers; of one expert too unless `moe_intermediate_size` is given.
    pub intermediate_size: usize,
    /// Inner width of one expert, I; `intermediate_size` unless given. See [`expert_width`](Self::expert_width).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_intermediate_size: Option<usize>,
    /// Inner width of a shared expert with a sigmoid gate (Qwen2-MoE); none unless given. See
    /// [`shared_expert_width`](Self::shared_expert_width).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_expert_intermediate_size: Option<usize>,
    /// Width of a shared expert without gate (DeepSeek), in widths of an expert; none unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_shared_experts: Option<usize>,
    /// What gated linear units apply to their gate; SiLU unless given.
    #[serde(default)]
    pub hidden_act: HiddenAct,
    /// Decoder layers, L.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, a divisor of the query heads (arXiv 2305.13245).
    pub num_key_value_heads: usize,
    /// Width of one head; `hidden_size / num_attention_heads` unless given. See [`head_dim`](Self::head_dim).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Width of the latent of keys and values: makes attention multi-head latent attention (DeepSeek-V2 and V3, arXiv
    /// 2405.04434), which needs the next three too. See [`latent_attention`](Self::latent_attention).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_lora_rank: Option<usize>,
    /// With latent attention, the part of a query's and key's head that is not rotated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_nope_head_dim: Option<usize>,
    /// With latent attention, the part that is rotated, of keys the same in all heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_rope_head_dim: Option<usize>,
    /// With latent attention, the width of a value's head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_head_dim: Option<usize>,
    /// With latent attention, the width of the latent of queries; they have none unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// Whether adjacent elements of a head are rotated together, and not those of its two halves; true with latent
    /// attention unless given, and else false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_interleave: Option<bool>,
    /// Layers without experts (Qwen2-MoE); none unless given. See [`is_moe_layer`](Self::is_moe_layer).
    #[serde(default)]
    pub mlp_only_layers: Vec<usize>,
    /// Every so many-th layer has experts, the others are dense (Qwen2-MoE); 1 unless given.
    #[serde(default = "default_decoder_sparse_step")]
    pub decoder_sparse_step: usize,
    /// So many first layers are dense (DeepSeek); 0 unless given.
    #[serde(default)]
    pub first_k_dense_replace: usize,
    /// Whether queries and keys have a norm before the rotation, as in Qwen3-MoE, GLM-4-MoE and OLMoE; false unless given.
    #[serde(default)]
    pub use_qk_norm: bool,
    /// What that norm is taken over; each head unless given.
    #[serde(default)]
    pub qk_norm_scope: QkNormScope,
    /// Whether the projections of queries, keys and values have a bias, as in Qwen2-MoE and GLM-4-MoE; false unless
    /// given. The output projection has none. With latent attention, whether those to the latents and the output
    /// projection have one, as in transformers' DeepSeek-V3.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the three projections of dense layers and shared experts have a bias, as in Llama; false unless given.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the three projections of each expert have a bias; false unless given. That of the last one is multiplied by
    /// the expert's weight, as its output is.
    #[serde(default)]
    pub expert_mlp_bias: bool,
    /// Keys that a query sees, itself among them; all up to its own unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// Experts of each MoE layer, E.
    pub num_local_experts: usize,
    /// Experts that each token goes to, K.
    pub num_experts_per_tok: usize,
    /// Added to the mean square in RMSNorm; 1e-5 unless given.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; 1e6 unless given.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// How the frequencies change for long sequences; not at all unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Standard deviation of the initial weights; 0.02 unless given.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Coefficient of the load-balancing loss of each micro-batch; 0.001 unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_aux_loss_coef: Option<f64>,
    /// Load-balancing losses of several scopes, in place of `router_aux_loss_coef`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub router_aux_losses: Vec<AuxLoss>,
    /// Coefficient of the router's z-loss (arXiv 2202.08906); 0 unless given.
    #[serde(default)]
    pub router_z_loss_coef: f64,
    /// From logits to scores; softmax over the chosen unless given.
    #[serde(default)]
    pub scoring_func: ScoringFunc,
    /// Type in which routers compute, from logits to losses; the accumulation type unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_router_dtype: Option<RouterDType>,
    /// In training, each element of what a router sees is multiplied by a random number within so much of 1; 0 unless given.
    #[serde(default)]
    pub router_jitter_noise: f64,
    /// In training, experts are chosen by so many iterations of Sinkhorn's algorithm on a micro-batch's logits, which spread
    /// its tokens evenly; by score unless given. See [`Sinkhorn`](moe_dispatch::Sinkhorn).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_router_sinkhorn_iterations: Option<usize>,
    /// Whether the chosen experts' weights are divided by their sum; true unless given.
    #[serde(default = "default_norm_topk_prob")]
    pub norm_topk_prob: bool,
    /// Multiplies the weights, after that division; 1 unless given.
    #[serde(default = "routing::default_routed_scaling_factor")]
    pub routed_scaling_factor: f64,
    /// Contiguous groups of experts, a constant of the model that no mapping changes; 1 unless given.
    #[serde(default = "routing::one_group")]
    pub n_group: usize,
    /// Groups that a token's experts may be of; 1 unless given.
    #[serde(default = "routing::one_group")]
    pub topk_group: usize,
    /// A group's score is the sum of the scores of so many of its experts, the best; 2 unless given (1 for
    /// DeepSeek-V2).
    #[serde(default = "routing::default_group_score_topk")]
    pub group_score_topk: usize,
    /// Whether the experts of a token are chosen by scores plus a bias that balances their load without a loss
    /// (DeepSeek-V3); false unless given. It takes `scoring_func` `"sigmoid"` or `"sqrtsoftplus"`. See
    /// [`ExpertBias`](crate::expert_bias::ExpertBias).
    #[serde(default)]
    pub moe_router_enable_expert_bias: bool,
    /// Whether the head uses the embedding's weight; false unless given.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// The token whose row of the embedding gets no gradient from lookups, as with torch's `padding_idx`; none unless given.
    /// Its lookups give the row as it is; a tied head's gradient and weight decay reach it. It says nothing of which
    /// positions are padding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_token_id: Option<usize>,
}

/// What the norms of queries and keys are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNormScope {
    /// Each head, with weights `[head_dim]` that all heads share (Qwen3-MoE).
    #[default]
    Head,
    /// All heads together, with weights `[heads · head_dim]` (OLMoE).
    Projection,
}

/// The activation of gated linear units, as Hugging Face names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// SwiGLU.
    #[default]
    Silu,
    /// GeGLU with the tanh approximation of GELU.
    GeluPytorchTanh,
}

/// The inner width of the expert that every token goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedExpertWidth {
    /// Its output is added as it is.
    Plain(usize),
    /// Its output is multiplied by a sigmoid of the token first.
    Gated(usize),
}

fn default_decoder_sparse_step() -> usize {
    1
}

fn default_rms_norm_eps() -> f64 {
    1e-5
}

fn default_rope_theta() -> f64 {
    1e6
}

fn default_initializer_range() -> f64 {
    0.02
}

fn default_norm_topk_prob() -> bool {
    true
}

/// Why a model configuration was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// One number must be a multiple of another.
    #[error(
        "{name} must be a multiple of {of_name}, but {value} % {of} = {}; nearest legal: {}",
        value.checked_rem(*of).unwrap_or(*value),
        nearest(name, *value, of_name, *of)
    )]
    Multiple {
        /// Name of the number.
        name: &'static str,
        /// The number.
        value: usize,
        /// Name of what must divide it.
        of_name: &'static str,
        /// What must divide it.
        of: usize,
    },
    /// A number is outside its range.
    #[error("{name} = {value}, but {name} must be {allowed}")]
    Range {
        /// Name of the number.
        name: &'static str,
        /// The number.
        value: f64,
        /// The range, in words that follow "must be".
        allowed: String,
    },
    /// Latent attention without one of its sizes.
    #[error(
        "{missing} is missing: latent attention needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim; \
         without it leave these and q_lora_rank out"
    )]
    LatentAttention {
        /// The missing key.
        missing: &'static str,
    },
    /// A setting is known but not built.
    #[error("{setting} is not supported: {why}")]
    Unsupported {
        /// The key and its value.
        setting: &'static str,
        /// What to do instead.
        why: &'static str,
    },
}

impl ModelConfig {
    /// Keys that change neither weights nor what is computed of them: losses, what starts weights, what disturbs or spreads
    /// the choice of experts in training, and the type that routers compute in.
    pub const TRAINING_ALONE: [&str; 7] = [
        "initializer_range",
        "router_aux_loss_coef",
        "router_aux_losses",
        "router_z_loss_coef",
        "router_jitter_noise",
        "moe_router_sinkhorn_iterations",
        "moe_router_dtype",
    ];

    /// The first key in which two models differ, but for those that `may`, with its value here and there.
    pub fn first_difference(
        &self,
        other: &ModelConfig,
        may: impl Fn(&str) -> bool,
    ) -> Option<(String, String, String)> {
        let keys = |model: &ModelConfig| match serde_json::to_value(model) {
            Ok(serde_json::Value::Object(keys)) => keys,
            _ => serde_json::Map::new(),
        };
        let (a, b) = (keys(self), keys(other));
        let mut names = a.keys().chain(b.keys());
        let name = names.find(|name| a.get(*name) != b.get(*name) && !may(name))?;
        let show = |value: Option<&serde_json::Value>| value.map_or("absent".to_owned(), ToString::to_string);
        Some((name.clone(), show(a.get(name)), show(b.get(name))))
    }

    /// Width of one head of grouped-query attention: [`head_dim`](Self#structfield.head_dim), or
    /// `hidden_size / num_attention_heads`.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// What of a query's and key's head is rotated: all of it, or `qk_rope_head_dim`.
    pub fn rotary_dim(&self) -> usize {
        self.latent_attention().map_or_else(|| self.head_dim(), |latent| latent.qk_rope_head_dim)
    }

    /// Which elements are rotated together, as kernels take it.
    pub fn rotary_pairs(&self) -> RotaryPairs {
        match self.rope_interleave.unwrap_or(self.kv_lora_rank.is_some()) {
            true => RotaryPairs::Adjacent,
            false => RotaryPairs::Halves,
        }
    }

    /// Inner width of one expert: `moe_intermediate_size`, or `intermediate_size`.
    pub fn expert_width(&self) -> usize {
        self.moe_intermediate_size.unwrap_or(self.intermediate_size)
    }

    /// The shared expert of each MoE layer, if there is one: `shared_expert_intermediate_size` with a gate, or
    /// `n_shared_experts` times the width of an expert without.
    pub fn shared_expert_width(&self) -> Option<SharedExpertWidth> {
        let gated = self.shared_expert_intermediate_size.map(SharedExpertWidth::Gated);
        gated.or(self.n_shared_experts.map(|n| SharedExpertWidth::Plain(n * self.expert_width())))
    }

    /// Whether layer `layer` has experts: it is none of `mlp_only_layers`, not among the first `first_k_dense_replace`,
    /// and `layer + 1` is a multiple of `decoder_sparse_step`.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer)
            && layer >= self.first_k_dense_replace
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }

    /// The layers with experts, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> {
        (0..self.num_hidden_layers).filter(|&layer| self.is_moe_layer(layer))
    }

    /// The gate's function, as kernels take it.
    pub fn gate_function(&self) -> GateFunction {
        match self.hidden_act {
            HiddenAct::Silu => GateFunction::Silu,
            HiddenAct::GeluPytorchTanh => GateFunction::GeluTanh,
        }
    }

    /// Standard deviation of the initial weights that write to the residual stream (`o_proj`, `w2`, `down_proj`):
    /// `initializer_range / sqrt(2L)`.
    pub fn residual_std(&self) -> f64 {
        self.initializer_range / (2.0 * self.num_hidden_layers as f64).sqrt()
    }

    /// Parameters of the whole model.
    pub fn parameters(&self) -> u64 {
        self.parameters_with(self.num_local_experts)
    }

    /// Parameters that one token meets: K experts of each layer, and all the rest.
    pub fn active_parameters(&self) -> u64 {
        self.parameters_with(self.num_experts_per_tok)
    }

    fn parameters_with(&self, experts: usize) -> u64 {
        let hidden = self.hidden_size as u64;
        let every_layer = self.attention_parameters() + 2 * hidden;
        let gated = |width: usize, biases: bool| {
            let width = width as u64;
            3 * width * hidden + if biases { 2 * width + hidden } else { 0 }
        };
        let shared = match self.shared_expert_width() {
            None => 0,
            Some(SharedExpertWidth::Plain(width)) => gated(width, self.mlp_bias),
            Some(SharedExpertWidth::Gated(width)) => gated(width, self.mlp_bias) + hidden,
        };
        let router = self.num_local_experts as u64 * hidden;
        let moe = experts as u64 * gated(self.expert_width(), self.expert_mlp_bias) + router + shared;
        let (layers, moe_layers) = (self.num_hidden_layers as u64, self.moe_layers().count() as u64);
        layers * every_layer
            + moe_layers * moe
            + (layers - moe_layers) * gated(self.intermediate_size, self.mlp_bias)
            + if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size as u64 * hidden
            + hidden
    }

    fn attention_parameters(&self) -> u64 {
        let [hidden, queries, keys] =
            [self.hidden_size, self.num_attention_heads, self.num_key_value_heads].map(|n| n as u64);
        if let Some(latent) = self.latent_attention() {
            return latent.parameters(hidden, queries, self.attention_bias);
        }
        let head_dim = self.head_dim() as u64;
        let norms = match (self.use_qk_norm, self.qk_norm_scope) {
            (false, _) => 0,
            (true, QkNormScope::Head) => 2 * head_dim,
            (true, QkNormScope::Projection) => (queries + keys) * head_dim,
        };
        let biases = if self.attention_bias { (queries + 2 * keys) * head_dim } else { 0 };
        2 * (queries + keys) * head_dim * hidden + norms + biases
    }

    fn has_dense_layers(&self) -> bool {
        self.moe_layers().count() < self.num_hidden_layers
    }

    /// What the model asks of a folding; fields of the batch are left open.
    pub fn constraints(&self) -> Constraints {
        Constraints {
            num_attention_heads: Some(self.num_attention_heads),
            num_key_value_heads: Some(self.num_key_value_heads),
            num_experts: Some(self.num_local_experts),
            moe_intermediate_size: Some(self.expert_width()),
            intermediate_size: self.has_dense_layers().then_some(self.intermediate_size),
            shared_expert_intermediate_size: self.shared_expert_width().map(|width| match width {
                SharedExpertWidth::Plain(width) | SharedExpertWidth::Gated(width) => width,
            }),
            num_hidden_layers: Some(self.num_hidden_layers),
            ..Constraints::default()
        }
    }

    /// The mapping with TP as two digits: the outer one tells key-value heads apart, the inner one counts the ranks that
    /// share a head where TP exceeds them.
    pub fn split_tp(&self, mapping: Mapping) -> Mapping {
        let distinct = mapping.tp.min(self.num_key_value_heads);
        mapping.split(Attention::TP_OUTER, distinct)
    }

    /// Whether the fields make sense together. What a mapping must satisfy is in [`constraints`](Self::constraints).
    ///
    /// # Errors
    /// The first field that does not fit, with its value and the nearest legal ones.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size.unwrap_or(1)),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.unwrap_or(1)),
            ("n_shared_experts", self.n_shared_experts.unwrap_or(1)),
            (
                "n_shared_experts · moe_intermediate_size",
                self.n_shared_experts.unwrap_or(1).saturating_mul(self.expert_width()),
            ),
            ("num_hidden_layers", self.num_hidden_layers),
            ("decoder_sparse_step", self.decoder_sparse_step),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
            ("num_local_experts", self.num_local_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
        ] {
            // Token ids, positions and row counts are 32-bit on devices.
            in_range(name, value as f64, 1.0..=f64::from(i32::MAX), "from 1 to 2147483647")?;
        }
        self.check_sizes()?;
        let heads = ("num_attention_heads", self.num_attention_heads);
        self.check_latent()?;
        if self.kv_lora_rank.is_none() {
            if self.head_dim.is_none() {
                multiple(("hidden_size", self.hidden_size), heads)?;
            }
            multiple(("head_dim", self.head_dim()), ("2 (rotary pairs)", 2))?;
            multiple(heads, ("num_key_value_heads", self.num_key_value_heads))?;
        }
        let (chosen, experts) = (self.num_experts_per_tok as f64, self.num_local_experts);
        let allowed = format!("from 1 to num_local_experts = {experts}");
        in_range("num_experts_per_tok", chosen, 1.0..=experts as f64, &allowed)?;

        let layers = self.num_hidden_layers;
        let allowed = format!("less than num_hidden_layers = {layers}");
        for &layer in &self.mlp_only_layers {
            in_range("a layer of mlp_only_layers", layer as f64, 0.0..=(layers - 1) as f64, &allowed)?;
        }
        let allowed = format!("at most num_hidden_layers = {layers}");
        let dense = self.first_k_dense_replace as f64;
        in_range("first_k_dense_replace", dense, 0.0..=layers as f64, &allowed)?;
        if self.shared_expert_intermediate_size.is_some() && self.n_shared_experts.is_some() {
            return Err(ConfigError::Unsupported {
                setting: "n_shared_experts beside shared_expert_intermediate_size",
                why: "a layer has one shared expert: the former has no gate, the latter one",
            });
        }

        in_range("rms_norm_eps", self.rms_norm_eps, f64::MIN_POSITIVE..=1.0, "above 0 and at most 1")?;
        self.check_rope()?;
        if let Some(id) = self.pad_token_id {
            let allowed = format!("less than vocab_size = {}", self.vocab_size);
            in_range("pad_token_id", id as f64, 0.0..=(self.vocab_size - 1) as f64, &allowed)?;
        }
        if self.qk_norm_scope == QkNormScope::Projection && !self.use_qk_norm {
            return Err(ConfigError::Unsupported {
                setting: "qk_norm_scope = projection without use_qk_norm",
                why: "it says what the norms of queries and keys are over; give use_qk_norm = true or leave it out",
            });
        }
        for (name, value) in
            [("initializer_range", self.initializer_range), ("router_z_loss_coef", self.router_z_loss_coef)]
        {
            in_range(name, value, 0.0..=f64::MAX, "finite and at least 0")?;
        }
        self.check_router()?;
        Ok(())
    }
}

fn in_range(
    name: &'static str,
    value: f64,
    range: std::ops::RangeInclusive<f64>,
    allowed: &str,
) -> Result<(), ConfigError> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(ConfigError::Range { name, value, allowed: allowed.to_owned() }),
    }
}

fn multiple((name, value): (&'static str, usize), of: (&'static str, usize)) -> Result<(), ConfigError> {
    match value.checked_rem(of.1) {
        Some(0) => Ok(()),
        _ => Err(ConfigError::Multiple { name, value, of_name: of.0, of: of.1 }),
    }
}

/// The multiples of `of` beside `value`, and the divisors of `value` beside `of` where it is a setting.
fn nearest(name: &str, value: usize, of_name: &str, of: usize) -> String {
    let of = of.max(1);
    let below = value / of * of;
    let multiples: Vec<usize> =
        [Some(below), below.checked_add(of)].into_iter().flatten().filter(|&m| m > 0).collect();
    let mut text = format!("{name} = {}", either(&multiples));
    if of_name.starts_with(char::is_alphabetic) {
        let divides = |d: &usize| value.is_multiple_of(*d);
        let smaller = (1..of.min(value + 1)).rev().find(divides);
        let larger = (of + 1..=value).find(divides);
        let divisors: Vec<usize> = [smaller, larger].into_iter().flatten().collect();
        text += &format!(", or {of_name} = {}", either(&divisors));
    }
    text
}

fn either(values: &[usize]) -> String {
    values.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mixtral() -> ModelConfig {
        ModelConfig {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 14336,
            moe_intermediate_size: None,
            shared_expert_intermediate_size: None,
            n_shared_experts: None,
            hidden_act: HiddenAct::Silu,
            mlp_only_layers: Vec::new(),
            decoder_sparse_step: 1,
            first_k_dense_replace: 0,
            use_qk_norm: false,
            qk_norm_scope: QkNormScope::Head,
            attention_bias: false,
            mlp_bias: false,
            expert_mlp_bias: false,
            sliding_window: None,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            kv_lora_rank: None,
            qk_nope_head_dim: None,
            qk_rope_head_dim: None,
            v_head_dim: None,
            q_lora_rank: None,
            rope_interleave: None,
            num_local_experts: 8,
            num_experts_per_tok: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            rope_scaling: None,
            initializer_range: 0.02,
            router_aux_loss_coef: Some(0.02),
            router_aux_losses: Vec::new(),
            router_z_loss_coef: 0.0,
            scoring_func: ScoringFunc::SoftmaxPost,
            moe_router_dtype: None,
            router_jitter_noise: 0.0,
            moe_router_sinkhorn_iterations: None,
            norm_topk_prob: true,
            routed_scaling_factor: 1.0,
            n_group: 1,
            topk_group: 1,
            group_score_topk: 2,
            moe_router_enable_expert_bias: false,
            tie_word_embeddings: false,
            pad_token_id: None,
        }
    }

    fn refusal(change: impl FnOnce(&mut ModelConfig)) -> String {
        let mut config = mixtral();
        change(&mut config);
        config.check().unwrap_err().to_string()
    }

    #[test]
    fn a_real_model_is_legal_and_round_trips() {
        let config = mixtral();
        config.check().unwrap();
        assert_eq!(config.head_dim(), 128);
        assert_eq!(config.residual_std(), 0.02 / 8.0);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config: ModelConfig = serde_json::from_str(
            r#"{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": null,
                "num_local_experts": 8, "num_experts_per_tok": 2}"#,
        )
        .unwrap();
        assert_eq!(config.rms_norm_eps, 1e-5);
        assert_eq!(config.rope_theta, 1e6);
        assert_eq!(config.initializer_range, 0.02);
        assert_eq!(config.aux_loss_coef(AuxLossScope::MicroBatch), 0.001);
        config.check().unwrap();
    }

    #[test]
    fn a_typo_is_refused() {
        let error = serde_json::from_str::<ModelConfig>(r#"{"vocab_sise": 1}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `vocab_sise`"), "{error}");
    }

    #[test]
    fn refusals_have_the_equation_the_values_and_legal_neighbours() {
        assert_eq!(
            refusal(|c| c.hidden_size = 4100),
            "hidden_size must be a multiple of num_attention_heads, but 4100 % 32 = 4; nearest legal: \
             hidden_size = 4096 or 4128, or num_attention_heads = 25 or 41"
        );
        assert_eq!(
            refusal(|c| c.num_key_value_heads = 5),
            "num_attention_heads must be a multiple of num_key_value_heads, but 32 % 5 = 2; nearest legal: \
             num_attention_heads = 30 or 35, or num_key_value_heads = 4 or 8"
        );
        assert_eq!(
            refusal(|c| c.num_key_value_heads = 64),
            "num_attention_heads must be a multiple of num_key_value_heads, but 32 % 64 = 32; nearest legal: \
             num_attention_heads = 64, or num_key_value_heads = 32"
        );
        assert_eq!(
            refusal(|c| c.head_dim = Some(7)),
            "head_dim must be a multiple of 2 (rotary pairs), but 7 % 2 = 1; nearest legal: head_dim = 6 or 8"
        );
        assert_eq!(
            refusal(|c| c.num_experts_per_tok = 9),
            "num_experts_per_tok = 9, but num_experts_per_tok must be from 1 to num_local_experts = 8"
        );
    }

    #[test]
    fn layers_are_dense_or_of_experts_in_any_pattern() {
        let layers = |change: fn(&mut ModelConfig)| {
            let mut config = ModelConfig { num_hidden_layers: 6, ..mixtral() };
            change(&mut config);
            config.check().unwrap();
            config.moe_layers().collect::<Vec<_>>()
        };
        assert_eq!(layers(|_| ()), [0, 1, 2, 3, 4, 5]);
        assert_eq!(layers(|c| c.mlp_only_layers = vec![4, 0]), [1, 2, 3, 5]);
        // As transformers' Qwen2MoeDecoderLayer: (layer + 1) % decoder_sparse_step == 0.
        assert_eq!(layers(|c| c.decoder_sparse_step = 2), [1, 3, 5]);
        assert_eq!(layers(|c| (c.decoder_sparse_step, c.mlp_only_layers) = (2, vec![3])), [1, 5]);
        // As transformers' DeepseekV3DecoderLayer: layer >= first_k_dense_replace.
        assert_eq!(layers(|c| c.first_k_dense_replace = 4), [4, 5]);
        assert_eq!(layers(|c| c.first_k_dense_replace = 6), [0; 0]);
        assert!(refusal(|c| c.mlp_only_layers = vec![32]).starts_with("a layer of mlp_only_layers = 32"));
        assert!(refusal(|c| c.first_k_dense_replace = 33).starts_with("first_k_dense_replace = 33"));
        assert!(refusal(|c| c.decoder_sparse_step = 0).starts_with("decoder_sparse_step = 0"));
    }

    #[test]
    fn shared_experts_have_one_width() {
        let config = ModelConfig { moe_intermediate_size: Some(768), ..mixtral() };
        assert_eq!(config.shared_expert_width(), None);
        let gated = ModelConfig { shared_expert_intermediate_size: Some(5632), ..config.clone() };
        assert_eq!(gated.shared_expert_width(), Some(SharedExpertWidth::Gated(5632)));
        let plain = ModelConfig { n_shared_experts: Some(2), ..config.clone() };
        assert_eq!(plain.shared_expert_width(), Some(SharedExpertWidth::Plain(1536)));
        assert_eq!(plain.parameters() - config.parameters(), 32 * 3 * 1536 * 4096);
        assert_eq!(gated.parameters() - config.parameters(), 32 * (3 * 5632 + 1) * 4096);
        let both = |c: &mut ModelConfig| {
            (c.n_shared_experts, c.shared_expert_intermediate_size) = (Some(1), Some(64))
        };
        assert!(refusal(both).contains("a layer has one shared expert"));
        assert!(refusal(|c| c.n_shared_experts = Some(0)).starts_with("n_shared_experts = 0"));
    }

    #[test]
    fn norms_of_heads_and_biases_are_parameters() {
        let normed = ModelConfig { use_qk_norm: true, ..mixtral() };
        assert_eq!(normed.parameters() - mixtral().parameters(), 32 * 2 * 128);
        let whole = ModelConfig { qk_norm_scope: QkNormScope::Projection, ..normed };
        whole.check().unwrap();
        assert_eq!(whole.parameters() - mixtral().parameters(), 32 * (32 + 8) * 128);
        let refused = refusal(|c| c.qk_norm_scope = QkNormScope::Projection);
        assert!(refused.starts_with("qk_norm_scope = projection without use_qk_norm"));
        let biased = ModelConfig { attention_bias: true, ..mixtral() };
        assert_eq!(biased.parameters() - mixtral().parameters(), 32 * (32 + 2 * 8) * 128);
        assert!(refusal(|c| c.sliding_window = Some(0)).starts_with("sliding_window = 0"));
    }

    #[test]
    fn a_tied_head_is_no_parameter() {
        let tied = ModelConfig { tie_word_embeddings: true, ..mixtral() };
        tied.check().unwrap();
        assert_eq!(mixtral().parameters() - tied.parameters(), 32000 * 4096);
    }

    #[test]
    fn only_the_tanh_approximation_of_gelu_is_there() {
        let parse = |act: &str| serde_json::from_value::<HiddenAct>(act.into());
        assert_eq!(parse("gelu_pytorch_tanh").unwrap(), HiddenAct::GeluPytorchTanh);
        assert!(parse("gelu").unwrap_err().to_string().contains("gelu_pytorch_tanh"));
    }

    #[test]
    fn every_number_has_a_range() {
        for (refused, name) in [
            (refusal(|c| c.vocab_size = 0), "vocab_size = 0"),
            (refusal(|c| c.num_attention_heads = 0), "num_attention_heads = 0"),
            (refusal(|c| c.head_dim = Some(0)), "head_dim = 0"),
            (refusal(|c| c.num_experts_per_tok = 0), "num_experts_per_tok = 0"),
            (refusal(|c| c.rms_norm_eps = 0.0), "rms_norm_eps = 0"),
            (refusal(|c| c.rope_theta = f64::INFINITY), "rope_theta = inf"),
            (
                refusal(|c| c.pad_token_id = Some(32000)),
                "pad_token_id = 32000, but pad_token_id must be less",
            ),
            (refusal(|c| c.initializer_range = f64::NAN), "initializer_range = NaN"),
            (refusal(|c| c.router_z_loss_coef = -0.5), "router_z_loss_coef = -0.5"),
            (refusal(|c| c.norm_topk_prob = false), "norm_topk_prob = false with scoring_func"),
        ] {
            assert!(refused.starts_with(name), "{refused}");
        }
    }

    #[test]
    fn tp_is_split_where_it_exceeds_the_key_value_heads() {
        for (tp, inner) in [(1, 1), (4, 1), (8, 1), (16, 2), (32, 4)] {
            let mapping = Mapping { world_size: tp, tp, ..Mapping::default() };
            let folding = moe_topology::Folding::new(mixtral().split_tp(mapping)).unwrap();
            assert_eq!(folding.size(Attention::TP_INNER), inner, "tp {tp}");
            assert_eq!(folding.size(Attention::TP_OUTER), tp / inner, "tp {tp}");
        }
    }

    #[test]
    fn constraints_reach_the_folding() {
        let mapping = moe_topology::Mapping { world_size: 3, ep: 3, ..Default::default() };
        let error = mixtral().constraints().fold(mapping).unwrap_err().to_string();
        assert!(error.contains("num_experts must be a multiple of ep"), "{error}");
    }
}
