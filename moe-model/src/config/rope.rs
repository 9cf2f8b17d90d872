//! The keys of the rotary position embedding, and what they make of its frequencies.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::{ConfigError, ModelConfig, in_range};

/// How frequencies change for sequences longer than a model was trained on: `rope_scaling`, by its key `rope_type`. Each
/// computes what the function of its name in transformers' `modeling_rope_utils.py` computes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept.
    Yarn(Yarn),
}

/// YaRN (arXiv 2309.00071). With dimension `d` and base θ, a pair makes `n` full turns over
/// `original_max_position_embeddings` at index `d·ln(original/(2π·n)) / (2·ln θ)`: pairs before that of `beta_fast` keep
/// their frequency, pairs behind that of `beta_slow` have it divided by `factor`, between them lies a linear ramp.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// Ratio of the length that is wanted to the original one, at least 1.
    pub factor: f64,
    /// Positions that the model was trained on before.
    pub original_max_position_embeddings: usize,
    /// Turns from which on frequencies are kept; 32 unless given.
    #[serde(default = "default_beta_fast")]
    pub beta_fast: f64,
    /// Turns up to which frequencies are divided; 1 unless given.
    #[serde(default = "default_beta_slow")]
    pub beta_slow: f64,
    /// With `mscale_all_dim`, a part of [`attention_factor`](Self#structfield.attention_factor).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// With `mscale`, a part of [`attention_factor`](Self#structfield.attention_factor); with latent attention also of the scale of
    /// its scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// Multiplies cosines and sines. Unless given it is `t(mscale) / t(mscale_all_dim)` with
    /// `t(m) = 0.1·m·ln(factor) + 1` if both are given, and else `t(1)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// Whether the two ends of the ramp are rounded outwards to whole pairs; true unless given.
    #[serde(default = "default_truncate")]
    pub truncate: bool,
}

fn default_beta_fast() -> f64 {
    32.0
}

fn default_beta_slow() -> f64 {
    1.0
}

fn default_truncate() -> bool {
    true
}

/// What the angles of a rotation are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryFrequencies {
    /// Angle per position of each pair, `rotary_dim / 2` of them.
    pub per_position: Vec<f64>,
    /// Multiplies cosines and sines.
    pub attention_factor: f64,
}

impl Yarn {
    /// `0.1·mscale·ln(factor) + 1`: what entropies of the scores need at the longer length.
    fn temperature(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }

    fn attention_factor(&self) -> f64 {
        self.attention_factor.unwrap_or_else(|| match (self.mscale, self.mscale_all_dim) {
            (Some(mscale), Some(all)) => self.temperature(mscale) / self.temperature(all),
            _ => self.temperature(1.0),
        })
    }

    /// Where the ramp from kept to divided frequencies begins and ends, in pairs.
    fn ramp(&self, dim: f64, theta: f64) -> (f64, f64) {
        let original = self.original_max_position_embeddings as f64;
        let pair = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}

impl ModelConfig {
    /// Frequencies of the rotation, `θ^(−2j/d)` unless [`rope_scaling`](Self#structfield.rope_scaling) changes them.
    pub fn rotary_frequencies(&self) -> RotaryFrequencies {
        let dim = self.rotary_dim() as f64;
        let plain = (0..self.rotary_dim() / 2).map(|j| self.rope_theta.powf(-2.0 * j as f64 / dim));
        match self.rope_scaling {
            None => RotaryFrequencies { per_position: plain.collect(), attention_factor: 1.0 },
            Some(RopeScaling::Linear { factor }) => {
                RotaryFrequencies { per_position: plain.map(|f| f / factor).collect(), attention_factor: 1.0 }
            }
            Some(RopeScaling::Yarn(yarn)) => {
                let (low, high) = yarn.ramp(dim, self.rope_theta);
                let scaled = plain.enumerate().map(|(j, f)| {
                    let divided = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / yarn.factor * divided + f * (1.0 - divided)
                });
                RotaryFrequencies {
                    per_position: scaled.collect(),
                    attention_factor: yarn.attention_factor(),
                }
            }
        }
    }

    /// Factor on the scores of attention: the inverse root of the width of a query's head. With latent attention and
    /// YaRN's `mscale_all_dim`, times `(0.1·mscale_all_dim·ln(factor) + 1)²`, as in DeepSeek's own code and in
    /// transformers' `DeepseekV3Attention`; no other attention does so.
    pub fn attention_scale(&self) -> f64 {
        let Some(latent) = self.latent_attention() else {
            return (self.head_dim() as f64).sqrt().recip();
        };
        let scale = (latent.qk_head_dim() as f64).sqrt().recip();
        match self.rope_scaling {
            Some(RopeScaling::Yarn(yarn @ Yarn { mscale_all_dim: Some(all), .. })) => {
                scale * yarn.temperature(all) * yarn.temperature(all)
            }
            _ => scale,
        }
    }

    /// The part of [`check`](Self::check) that concerns rotations.
    pub(super) fn check_rope(&self) -> Result<(), ConfigError> {
        in_range("rope_theta", self.rope_theta, 1.0..=f64::MAX, "finite and at least 1")?;
        let Some(scaling) = self.rope_scaling else {
            return Ok(());
        };
        let (RopeScaling::Linear { factor } | RopeScaling::Yarn(Yarn { factor, .. })) = scaling;
        in_range("rope_scaling.factor", factor, 1.0..=f64::MAX, "finite and at least 1")?;
        let RopeScaling::Yarn(yarn) = scaling else {
            return Ok(());
        };
        let above_one = 1.0 + f64::EPSILON..=f64::MAX;
        in_range("rope_theta with YaRN", self.rope_theta, above_one, "finite and above 1")?;
        let positions = yarn.original_max_position_embeddings as f64;
        let allowed = 1.0..=f64::from(i32::MAX);
        in_range("original_max_position_embeddings", positions, allowed, "from 1 to 2147483647")?;
        for (name, value) in [
            ("rope_scaling.beta_slow", yarn.beta_slow),
            ("rope_scaling.mscale", yarn.mscale.unwrap_or(1.0)),
            ("rope_scaling.mscale_all_dim", yarn.mscale_all_dim.unwrap_or(1.0)),
            ("rope_scaling.attention_factor", yarn.attention_factor.unwrap_or(1.0)),
        ] {
            in_range(name, value, f64::MIN_POSITIVE..=f64::MAX, "finite and above 0")?;
        }
        let allowed = format!("finite and at least beta_slow = {}", yarn.beta_slow);
        in_range("rope_scaling.beta_fast", yarn.beta_fast, yarn.beta_slow..=f64::MAX, &allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(rope_scaling: &str) -> ModelConfig {
        let json = format!(
            r#"{{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
                "rope_scaling": {rope_scaling}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn scalings_are_told_by_their_type_and_have_defaults() {
        assert_eq!(model("null").rope_scaling, None);
        let linear = model(r#"{"rope_type": "linear", "factor": 2}"#);
        assert_eq!(linear.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
        let yarn = model(r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}"#);
        let expected = Yarn {
            factor: 4.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
            truncate: true,
        };
        assert_eq!(yarn.rope_scaling, Some(RopeScaling::Yarn(expected)));
        for config in [linear, yarn] {
            config.check().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<ModelConfig>(&json).unwrap(), config);
        }
    }

    #[test]
    fn other_types_and_keys_are_refused() {
        let refused = |json: &str| serde_json::from_str::<RopeScaling>(json).unwrap_err().to_string();
        assert!(refused(r#"{"rope_type": "llama3", "factor": 2.0}"#).contains("unknown variant `llama3`"));
        assert!(refused(r#"{"rope_type": "linear", "factor": 2.0, "mscale": 1.0}"#).contains("`mscale`"));
        let yarn = r#"{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "long_factor": 1.0}"#;
        assert!(refused(yarn).contains("unknown field `long_factor`"));
        assert!(
            refused(r#"{"rope_type": "yarn", "factor": 2.0}"#).contains("original_max_position_embeddings")
        );
    }

    #[test]
    fn every_number_has_a_range() {
        let yarn = Yarn {
            factor: 4.0,
            original_max_position_embeddings: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: Some(1.0),
            attention_factor: None,
            truncate: true,
        };
        let refusal = |change: fn(&mut Yarn), rope_theta| {
            let mut yarn = yarn;
            change(&mut yarn);
            let rope_scaling = Some(RopeScaling::Yarn(yarn));
            ModelConfig { rope_scaling, rope_theta, ..model("null") }.check().unwrap_err().to_string()
        };
        for (refused, start) in [
            (refusal(|y| y.factor = 0.5, 1e4), "rope_scaling.factor = 0.5"),
            (refusal(|y| y.factor = f64::NAN, 1e4), "rope_scaling.factor = NaN"),
            (
                refusal(|y| y.original_max_position_embeddings = 0, 1e4),
                "original_max_position_embeddings = 0",
            ),
            (refusal(|y| y.beta_slow = 0.0, 1e4), "rope_scaling.beta_slow = 0"),
            (refusal(|y| y.beta_fast = 0.5, 1e4), "rope_scaling.beta_fast = 0.5"),
            (refusal(|y| y.mscale = Some(0.0), 1e4), "rope_scaling.mscale = 0"),
            (refusal(|y| y.mscale_all_dim = Some(-1.0), 1e4), "rope_scaling.mscale_all_dim = -1"),
            (refusal(|y| y.attention_factor = Some(0.0), 1e4), "rope_scaling.attention_factor = 0"),
            (refusal(|_| (), 1.0), "rope_theta with YaRN = 1"),
        ] {
            assert!(refused.starts_with(start), "{refused}");
        }
    }
}
