//! Families of models on the hub.

/// A family of models: one `model_type` of `config.json`, one set of names of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `mixtral` (arXiv 2401.04088).
    Mixtral,
    /// `qwen2_moe` (arXiv 2407.10671).
    Qwen2Moe,
    /// `qwen3_moe` (arXiv 2505.09388).
    Qwen3Moe,
    /// `olmoe` (arXiv 2409.02060).
    Olmoe,
    /// `deepseek_v3` (arXiv 2412.19437).
    DeepseekV3,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 5] =
        [Family::Mixtral, Family::Qwen2Moe, Family::Qwen3Moe, Family::Olmoe, Family::DeepseekV3];

    /// Its `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Family::Mixtral => "mixtral",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Olmoe => "olmoe",
            Family::DeepseekV3 => "deepseek_v3",
        }
    }

    /// Its class in transformers, of models that predict the next token.
    pub const fn architecture(self) -> &'static str {
        match self {
            Family::Mixtral => "MixtralForCausalLM",
            Family::Qwen2Moe => "Qwen2MoeForCausalLM",
            Family::Qwen3Moe => "Qwen3MoeForCausalLM",
            Family::Olmoe => "OlmoeForCausalLM",
            Family::DeepseekV3 => "DeepseekV3ForCausalLM",
        }
    }
}
