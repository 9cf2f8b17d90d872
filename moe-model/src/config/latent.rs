//! The keys of multi-head latent attention.

use super::{ConfigError, ModelConfig, in_range, multiple};

/// Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentAttention {
    /// Width of the latent of queries; without one they are projected from the hidden state.
    pub q_lora_rank: Option<usize>,
    /// Width of the latent of keys and values.
    pub kv_lora_rank: usize,
    /// The part of a query's and key's head without position.
    pub qk_nope_head_dim: usize,
    /// The rotated part, of keys the same in all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a value's head.
    pub v_head_dim: usize,
}

impl LatentAttention {
    /// Width of a query's and key's head.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Weights of one layer's attention, biases among them if there are any.
    pub(super) fn parameters(&self, hidden: u64, heads: u64, biases: bool) -> u64 {
        let [kv_rank, nope, rope, v] =
            [self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim]
                .map(|n| n as u64);
        let q = match self.q_lora_rank.map(|rank| rank as u64) {
            Some(rank) => rank * (hidden + 1 + heads * (nope + rope) + u64::from(biases)),
            None => hidden * heads * (nope + rope),
        };
        let kv = hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v);
        let biases = if biases { kv_rank + rope + hidden } else { 0 };
        q + kv + heads * v * hidden + biases
    }
}

impl ModelConfig {
    /// The sizes of multi-head latent attention, if the model has `kv_lora_rank`.
    pub fn latent_attention(&self) -> Option<LatentAttention> {
        Some(LatentAttention {
            q_lora_rank: self.q_lora_rank,
            kv_lora_rank: self.kv_lora_rank?,
            qk_nope_head_dim: self.qk_nope_head_dim?,
            qk_rope_head_dim: self.qk_rope_head_dim?,
            v_head_dim: self.v_head_dim?,
        })
    }

    /// The part of [`check`](Self::check) that concerns latent attention.
    pub(super) fn check_latent(&self) -> Result<(), ConfigError> {
        let keys = [
            ("q_lora_rank", self.q_lora_rank, false),
            ("kv_lora_rank", self.kv_lora_rank, true),
            ("qk_nope_head_dim", self.qk_nope_head_dim, true),
            ("qk_rope_head_dim", self.qk_rope_head_dim, true),
            ("v_head_dim", self.v_head_dim, true),
        ];
        if keys.iter().all(|(_, value, _)| value.is_none()) {
            return Ok(());
        }
        for (name, value, needed) in keys {
            match value {
                Some(value) => {
                    in_range(name, value as f64, 1.0..=f64::from(i32::MAX), "from 1 to 2147483647")?;
                }
                None if needed => return Err(ConfigError::LatentAttention { missing: name }),
                None => {}
            }
        }
        let unsupported = |setting, why| Err(ConfigError::Unsupported { setting, why });
        let rotated = self.qk_rope_head_dim.unwrap_or(0);
        multiple(("qk_rope_head_dim", rotated), ("2 (rotary pairs)", 2))?;
        if self.num_key_value_heads != self.num_attention_heads {
            return unsupported(
                "num_key_value_heads other than num_attention_heads with kv_lora_rank",
                "latent attention gives each head keys and values of its own; give both the same number",
            );
        }
        if self.head_dim.is_some_and(|dim| dim != rotated) {
            return unsupported(
                "head_dim other than qk_rope_head_dim with kv_lora_rank",
                "heads are qk_nope_head_dim + qk_rope_head_dim and v_head_dim wide; leave head_dim out",
            );
        }
        if self.use_qk_norm {
            return unsupported(
                "use_qk_norm with kv_lora_rank",
                "latent attention has norms of its latents in place of norms of its heads; leave it out",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deepseek() -> ModelConfig {
        serde_json::from_str(
            r#"{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
                "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
                "n_shared_experts": 1, "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4,
                "routed_scaling_factor": 2.5}"#,
        )
        .unwrap()
    }

    fn refusal(change: impl FnOnce(&mut ModelConfig)) -> String {
        let mut config = deepseek();
        change(&mut config);
        config.check().unwrap_err().to_string()
    }

    /// The published sizes: 671 billion parameters, 37 billion of them active (without the module for prediction of several
    /// tokens), of which this counts every one but the 256 biases of each router.
    #[test]
    fn deepseek_v3_has_its_parameters() {
        let config = deepseek();
        config.check().unwrap();
        assert_eq!(config.parameters(), 671_026_404_352);
        assert_eq!(config.active_parameters() / 100_000_000, 375);
        let biased = ModelConfig { attention_bias: true, ..config.clone() };
        assert_eq!(biased.parameters() - config.parameters(), 61 * (1536 + 512 + 64 + 7168));
        let direct = ModelConfig { q_lora_rank: None, ..config.clone() };
        let (with, without) = (1536 * (7168 + 1 + 128 * 192), 7168 * 128 * 192);
        assert_eq!(direct.parameters() - config.parameters(), 61 * (without - with));
    }

    #[test]
    fn sizes_come_together() {
        assert_eq!(deepseek().latent_attention().unwrap().qk_head_dim(), 192);
        assert_eq!(ModelConfig { kv_lora_rank: None, ..deepseek() }.latent_attention(), None);
        assert_eq!(
            refusal(|c| c.v_head_dim = None),
            "v_head_dim is missing: latent attention needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and \
             v_head_dim; without it leave these and q_lora_rank out"
        );
        assert!(refusal(|c| c.kv_lora_rank = None).starts_with("kv_lora_rank is missing"));
        assert!(refusal(|c| c.q_lora_rank = Some(0)).starts_with("q_lora_rank = 0"));
        assert!(refusal(|c| c.qk_rope_head_dim = Some(7)).contains("2 (rotary pairs)"));
    }

    #[test]
    fn what_it_has_no_place_for_is_refused() {
        assert!(refusal(|c| c.num_key_value_heads = 8).starts_with("num_key_value_heads other than"));
        assert!(refusal(|c| c.head_dim = Some(192)).starts_with("head_dim other than qk_rope_head_dim"));
        assert!(refusal(|c| c.use_qk_norm = true).starts_with("use_qk_norm with kv_lora_rank"));
        ModelConfig { head_dim: Some(64), ..deepseek() }.check().unwrap();
    }
}
