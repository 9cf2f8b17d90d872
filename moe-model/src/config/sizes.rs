//! How large a model may be.

use super::{ConfigError, ModelConfig, in_range};

/// Layers times experts, at most: tensors that a layout has to name. A thousand layers of a thousand experts.
const TENSORS: f64 = 1e6;
/// Elements of a matrix of all experts or heads, at most: none is as large, and products of them are numbers of 64 bits.
const ELEMENTS: f64 = 1e12;

impl ModelConfig {
    /// That a layout can be made, whatever a file said: nothing is allocated before for more than there can be, and nothing
    /// overflows.
    pub(super) fn check_sizes(&self) -> Result<(), ConfigError> {
        let product = |factors: &[usize]| factors.iter().map(|&n| n as f64).product::<f64>();
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads.max(self.num_key_value_heads));
        let layers = product(&[self.num_hidden_layers, self.num_local_experts]);
        in_range("num_hidden_layers · num_local_experts", layers, 1.0..=TENSORS, "at most 1000000")?;
        let latent = |width: Option<usize>| width.unwrap_or(1);
        let head_dim = [self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim].map(latent);
        let head_dim = self.head_dim().max(head_dim.into_iter().fold(0, usize::saturating_add));
        let rank = hidden.max(latent(self.q_lora_rank)).max(latent(self.kv_lora_rank));
        for (name, elements) in [
            ("vocab_size · hidden_size", product(&[self.vocab_size, hidden])),
            ("num_attention_heads · head_dim · hidden_size", product(&[heads, head_dim, rank])),
            ("hidden_size · the latent's rank", product(&[hidden, rank])),
            ("intermediate_size · hidden_size", product(&[self.intermediate_size, hidden])),
            (
                "num_local_experts · the width of an expert · hidden_size",
                product(&[self.num_local_experts, self.expert_width(), hidden]),
            ),
            (
                "the width of the shared expert · hidden_size",
                product(&[
                    self.shared_expert_intermediate_size
                        .unwrap_or(latent(self.n_shared_experts).saturating_mul(self.expert_width())),
                    hidden,
                ]),
            ),
        ] {
            in_range(name, elements, 1.0..=ELEMENTS, "at most 1000000000000")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_model_has_is_refused_before_a_layout_is_made() {
        let model: ModelConfig = serde_json::from_str(
            r#"{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
                "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128, "moe_intermediate_size": 2048,
                "num_local_experts": 384, "num_experts_per_tok": 8}"#,
        )
        .unwrap();
        model.check().unwrap();
        let most = i32::MAX as usize;
        type Change = fn(&mut ModelConfig, usize);
        let changes: [(&str, Change); 7] = [
            ("num_hidden_layers · num_local_experts = ", |c, n| c.num_hidden_layers = n),
            ("num_hidden_layers · num_local_experts = ", |c, n| c.num_local_experts = n),
            ("vocab_size · hidden_size = ", |c, n| c.vocab_size = n),
            ("num_attention_heads · head_dim · hidden_size = ", |c, n| c.head_dim = Some(n - 1)),
            ("intermediate_size · hidden_size = ", |c, n| c.intermediate_size = n),
            ("num_local_experts · the width", |c, n| c.moe_intermediate_size = Some(n)),
            ("the width of the shared expert", |c, n| c.shared_expert_intermediate_size = Some(n)),
        ];
        for (said, change) in changes {
            let mut model = model.clone();
            change(&mut model, most);
            let error = model.check().unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
