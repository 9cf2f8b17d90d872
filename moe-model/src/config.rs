//! What defines a model: the keys of a Hugging Face `config.json`.

use moe_kernels::family::ScoreFunction;
use moe_topology::{Attention, Constraints, Mapping};
use serde::{Deserialize, Serialize};

/// A Mixtral-like decoder (arXiv 2401.04088). Fields carry the names of Hugging Face's `MixtralConfig`; those that have
/// a default there have it here.
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
    /// Inner width of one expert, I.
    pub intermediate_size: usize,
    /// Decoder layers, L.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, a divisor of the query heads (arXiv 2305.13245).
    pub num_key_value_heads: usize,
    /// Width of one head; `hidden_size / num_attention_heads` unless given. See [`head_dim`](Self::head_dim).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Experts of each layer, E.
    pub num_local_experts: usize,
    /// Experts that each token goes to, K.
    pub num_experts_per_tok: usize,
    /// Added to the mean square in RMSNorm; 1e-5 unless given.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; 1e6 unless given.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Standard deviation of the initial weights; 0.02 unless given.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Coefficient of the load-balancing loss; 0.001 unless given.
    #[serde(default = "default_router_aux_loss_coef")]
    pub router_aux_loss_coef: f64,
    /// Coefficient of the router's z-loss (arXiv 2202.08906); 0 unless given.
    #[serde(default)]
    pub router_z_loss_coef: f64,
    /// How logits become weights; softmax over the chosen unless given.
    #[serde(default)]
    pub router_score: RouterScore,
    /// Whether the chosen experts' weights are divided by their sum; true unless given.
    #[serde(default = "default_norm_topk_prob")]
    pub norm_topk_prob: bool,
    /// Whether the head uses the embedding's weight. [`check`](Self::check) refuses `true`, which is not built yet.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

/// From router logits to weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterScore {
    /// Softmax over the K chosen logits.
    #[default]
    SoftmaxPost,
    /// Softmax over all E logits; the chosen are divided by their sum if `norm_topk_prob`.
    SoftmaxPre,
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

fn default_router_aux_loss_coef() -> f64 {
    0.001
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
    /// Width of one head: [`head_dim`](Self#structfield.head_dim), or `hidden_size / num_attention_heads`.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Standard deviation of the initial weights that write to the residual stream (`o_proj`, `w2`):
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
        let heads = (self.num_attention_heads + self.num_key_value_heads) as u64 * self.head_dim() as u64;
        let attention = 2 * heads * hidden;
        let experts = 3 * experts as u64 * self.intermediate_size as u64 * hidden;
        let router = self.num_local_experts as u64 * hidden;
        let layer = attention + experts + router + 2 * hidden;
        self.num_hidden_layers as u64 * layer + 2 * self.vocab_size as u64 * hidden + hidden
    }

    /// The router's score function, as kernels take it.
    pub fn score_function(&self) -> ScoreFunction {
        match self.router_score {
            RouterScore::SoftmaxPost => ScoreFunction::SoftmaxPost,
            RouterScore::SoftmaxPre => ScoreFunction::SoftmaxPre { normalize: self.norm_topk_prob },
        }
    }

    /// What the model asks of a folding; fields of the batch are left open.
    pub fn constraints(&self) -> Constraints {
        Constraints {
            num_attention_heads: Some(self.num_attention_heads),
            num_key_value_heads: Some(self.num_key_value_heads),
            num_experts: Some(self.num_local_experts),
            moe_intermediate_size: Some(self.intermediate_size),
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
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim.unwrap_or(1)),
            ("num_local_experts", self.num_local_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
        ] {
            // Token ids, positions and row counts are 32-bit on devices.
            in_range(name, value as f64, 1.0..=f64::from(i32::MAX), "from 1 to 2147483647")?;
        }
        let heads = ("num_attention_heads", self.num_attention_heads);
        if self.head_dim.is_none() {
            multiple(("hidden_size", self.hidden_size), heads)?;
        }
        multiple(("head_dim", self.head_dim()), ("2 (rotary pairs)", 2))?;
        multiple(heads, ("num_key_value_heads", self.num_key_value_heads))?;
        let (chosen, experts) = (self.num_experts_per_tok as f64, self.num_local_experts);
        let allowed = format!("from 1 to num_local_experts = {experts}");
        in_range("num_experts_per_tok", chosen, 1.0..=experts as f64, &allowed)?;

        in_range("rms_norm_eps", self.rms_norm_eps, f64::MIN_POSITIVE..=1.0, "above 0 and at most 1")?;
        in_range("rope_theta", self.rope_theta, 1.0..=f64::MAX, "finite and at least 1")?;
        for (name, value) in [
            ("initializer_range", self.initializer_range),
            ("router_aux_loss_coef", self.router_aux_loss_coef),
            ("router_z_loss_coef", self.router_z_loss_coef),
        ] {
            in_range(name, value, 0.0..=f64::MAX, "finite and at least 0")?;
        }
        if self.tie_word_embeddings {
            return Err(ConfigError::Unsupported {
                setting: "tie_word_embeddings = true",
                why: "the head has its own weight; set it to false",
            });
        }
        if self.router_score == RouterScore::SoftmaxPost && !self.norm_topk_prob {
            return Err(ConfigError::Unsupported {
                setting: "norm_topk_prob = false with router_score = \"softmax-post\"",
                why: "a softmax over the chosen experts sums to 1; use router_score = \"softmax-pre\"",
            });
        }
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
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            num_local_experts: 8,
            num_experts_per_tok: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            initializer_range: 0.02,
            router_aux_loss_coef: 0.02,
            router_z_loss_coef: 0.0,
            router_score: RouterScore::SoftmaxPost,
            norm_topk_prob: true,
            tie_word_embeddings: false,
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
        assert_eq!(config.router_aux_loss_coef, 0.001);
        assert_eq!(config.score_function(), ScoreFunction::SoftmaxPost);
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
    fn every_number_has_a_range() {
        for (refused, name) in [
            (refusal(|c| c.vocab_size = 0), "vocab_size = 0"),
            (refusal(|c| c.num_attention_heads = 0), "num_attention_heads = 0"),
            (refusal(|c| c.head_dim = Some(0)), "head_dim = 0"),
            (refusal(|c| c.num_experts_per_tok = 0), "num_experts_per_tok = 0"),
            (refusal(|c| c.rms_norm_eps = 0.0), "rms_norm_eps = 0"),
            (refusal(|c| c.rope_theta = f64::INFINITY), "rope_theta = inf"),
            (refusal(|c| c.initializer_range = f64::NAN), "initializer_range = NaN"),
            (refusal(|c| c.router_aux_loss_coef = -0.5), "router_aux_loss_coef = -0.5"),
            (refusal(|c| c.tie_word_embeddings = true), "tie_word_embeddings = true is not supported"),
            (refusal(|c| c.norm_topk_prob = false), "norm_topk_prob = false with router_score"),
        ] {
            assert!(refused.starts_with(name), "{refused}");
        }
    }

    #[test]
    fn softmax_before_the_choice_may_stay_unnormalised() {
        let config =
            ModelConfig { router_score: RouterScore::SoftmaxPre, norm_topk_prob: false, ..mixtral() };
        config.check().unwrap();
        assert_eq!(config.score_function(), ScoreFunction::SoftmaxPre { normalize: false });
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
