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
