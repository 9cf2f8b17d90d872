//! What training a token costs.

use super::{ModelConfig, SharedExpertWidth};

/// A multiplication and an addition for each weight.
const PER_WEIGHT: f64 = 2.0;
/// A product of forward, and in backward one for the gradient of each of its operands.
const PASSES: f64 = 3.0;

impl ModelConfig {
    /// Floating-point operations of forward and backward for one token of a sequence of `sequence_length`, the F of model
    /// FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): 2 for each weight of a matrix that the token meets and for each element of
    /// the products of attention, times 3.
    ///
    /// Counted are the projections of attention, the pairs of query and key that are seen (causal, and within
    /// `sliding_window`), K experts, shared experts, dense layers and the head. Not counted are the router, the gate of a shared
    /// expert, what is not a product, what backward makes again, and anything for a sequence of several documents: it
    /// counts as one text.
    ///
    /// ```
    /// # let mixtral: moe_model::config::ModelConfig = serde_json::from_str(
    /// #   r#"{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    /// #       "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}"#)?;
    /// let flops = mixtral.training_flops_per_token(4096);
    /// // Six for each of the 12.7 billion parameters that a token meets, and attention.
    /// assert_eq!((flops / 1e9).round(), 80.0);
    /// # Ok::<(), serde_json::Error>(())
    /// ```
    pub fn training_flops_per_token(&self, sequence_length: usize) -> f64 {
        let hidden = self.hidden_size as f64;
        // Gate, up and down.
        let gated = |width: usize| 3.0 * hidden * width as f64;
        let shared = match self.shared_expert_width() {
            None => 0.0,
            Some(SharedExpertWidth::Plain(width) | SharedExpertWidth::Gated(width)) => gated(width),
        };
        let experts = self.num_experts_per_tok as f64 * gated(self.expert_width()) + shared;
        let (layers, moe_layers) = (self.num_hidden_layers as f64, self.moe_layers().count() as f64);
        let (projections, attention_per_key) = self.attention_products();
        let every_layer = projections + attention_per_key * self.mean_keys(sequence_length);
        let dense_layers = (layers - moe_layers) * gated(self.intermediate_size);
        let head = hidden * self.vocab_size as f64;
        PASSES * PER_WEIGHT * (layers * every_layer + moe_layers * experts + dense_layers + head)
    }

    /// Weights of a layer's projections, and elements of the heads that meet for each key: those of queries and of values.
    fn attention_products(&self) -> (f64, f64) {
        let [hidden, heads, kv_heads] =
            [self.hidden_size, self.num_attention_heads, self.num_key_value_heads].map(|n| n as f64);
        let Some(latent) = self.latent_attention() else {
            let head_dim = self.head_dim() as f64;
            return (2.0 * hidden * (heads + kv_heads) * head_dim, 2.0 * heads * head_dim);
        };
        let [kv_rank, nope, rope, v] =
            [latent.kv_lora_rank, latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim]
                .map(|n| n as f64);
        let queries = match latent.q_lora_rank {
            Some(rank) => rank as f64 * (hidden + heads * (nope + rope)),
            None => hidden * heads * (nope + rope),
        };
        let keys = hidden * (kv_rank + rope) + kv_rank * heads * (nope + v);
        (queries + keys + heads * v * hidden, heads * (nope + rope + v))
    }

    /// Keys that a query sees, S/2 on average, or w − w²/2S with a window of w: half of the diagonal.
    fn mean_keys(&self, sequence_length: usize) -> f64 {
        let length = sequence_length as f64;
        let window = self.sliding_window.map_or(length, |window| length.min(window as f64));
        match sequence_length {
            0 => 0.0,
            _ => window - window * window / (2.0 * length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(json: &str) -> ModelConfig {
        let model: ModelConfig = serde_json::from_str(json).unwrap();
        model.check().unwrap();
        model
    }

    fn mixtral(layers: usize) -> ModelConfig {
        model(&format!(
            r#"{{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": {layers},
                "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}}"#
        ))
    }

    fn qwen3(layers: usize) -> ModelConfig {
        model(&format!(
            r#"{{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                "num_hidden_layers": {layers}, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                "num_local_experts": 128, "num_experts_per_tok": 8, "use_qk_norm": true}}"#
        ))
    }

    fn deepseek_v3() -> ModelConfig {
        model(
            r#"{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
                "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
                "n_shared_experts": 1}"#,
        )
    }

    /// Worked out by hand, product by product, at S = 4096.
    #[test]
    fn real_models_have_the_sums_of_their_products() {
        // A layer: q and o 2·4096², k and v 2·4096·1024, scores and values 2·4096·2048, experts 2·3·4096·14336.
        let layer = 2 * (33_554_432_u64 + 8_388_608 + 16_777_216 + 352_321_536);
        let head = 2 * 131_072_000;
        for layers in [3, 32] {
            let sum = 3 * (layers as u64 * layer + head);
            assert_eq!(mixtral(layers).training_flops_per_token(4096), sum as f64);
        }
        // q and o 2·2048·4096, k and v 2·2048·512, scores and values 2·4096·2048, experts 8·3·2048·768.
        let layer = 2 * (16_777_216_u64 + 2_097_152 + 16_777_216 + 37_748_736);
        let sum = 3 * (8 * layer + 2 * 311_164_928);
        assert_eq!(qwen3(8).training_flops_per_token(4096), sum as f64);
        // Queries 1536·(7168 + 128·192), keys and values 7168·576 + 512·128·256, output 128·128·7168, scores and values
        // 128·(192 + 128)·2048; 9 experts of 3·7168·2048 in 58 layers, 3·7168·18432 in 3.
        let attention = 48_758_784_u64 + 4_128_768 + 16_777_216 + 117_440_512 + 83_886_080;
        let layers = 61 * attention + 58 * 9 * 44_040_192 + 3 * 396_361_728;
        let sum = 6 * (layers + 926_679_040);
        assert_eq!(deepseek_v3().training_flops_per_token(4096), sum as f64);
    }

    /// At S = 0 there is no attention: 6 for each parameter that is neither looked up, nor a vector, nor a router's.
    #[test]
    fn matrices_are_counted_once() {
        for (model, uncounted) in [
            (mixtral(32), 4096 * 32000 + 32 * 4096 * (8 + 2) + 4096),
            (qwen3(8), 2048 * 151_936 + 8 * (2048 * (128 + 2) + 2 * 128) + 2048),
            (deepseek_v3(), 7168 * 129_280 + 61 * (2 * 7168 + 1536 + 512) + 58 * 256 * 7168 + 7168),
        ] {
            let flops = 6 * (model.active_parameters() - uncounted);
            assert_eq!(model.training_flops_per_token(0), flops as f64);
        }
        let shared = ModelConfig { shared_expert_intermediate_size: Some(5632), ..qwen3(8) };
        let more = shared.training_flops_per_token(4096) - qwen3(8).training_flops_per_token(4096);
        assert_eq!(more, (8 * 6 * 3 * 2048 * 5632) as f64);
        let direct = ModelConfig { q_lora_rank: None, ..deepseek_v3() };
        let less = deepseek_v3().training_flops_per_token(64) - direct.training_flops_per_token(64);
        let (with, without) = (1536 * (7168 + 128 * 192), 7168 * 128 * 192);
        assert_eq!(less, 61.0 * 6.0 * f64::from(with - without));
    }

    /// Of the keys counted one by one, queries see themselves whole, not half: less than one key more.
    #[test]
    fn a_window_hides_keys() {
        for (length, window) in
            [(4096, None), (4096, Some(1024)), (4096, Some(1)), (100, Some(4096)), (1, None)]
        {
            let seen: usize = (1..=length).map(|keys: usize| keys.min(window.unwrap_or(keys))).sum();
            let model = ModelConfig { sliding_window: window, ..mixtral(1) };
            let less = seen as f64 / length as f64 - model.mean_keys(length);
            assert!((0.0..=0.5).contains(&less), "{length} {window:?}: {less}");
        }
    }
}
