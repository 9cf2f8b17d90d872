//! From a model to the keys of the family that may have it.

use moe_kernels::family::RotaryPairs;
use serde_json::{Map, Value, json};

use crate::ModelConfig;
use crate::config::{AuxLossScope, HiddenAct, QkNormScope, RopeScaling, ScoringFunc, SharedExpertWidth};
use crate::hf::Family;

/// The nearest family, and the model's keys in it.
pub(super) fn of_model(model: &ModelConfig) -> (Family, Map<String, Value>) {
    let family = if model.kv_lora_rank.is_some() {
        Family::DeepseekV3
    } else if model.use_qk_norm && model.qk_norm_scope == QkNormScope::Projection {
        Family::Olmoe
    } else if model.use_qk_norm {
        Family::Qwen3Moe
    } else if matches!(model.shared_expert_width(), Some(SharedExpertWidth::Gated(_))) {
        Family::Qwen2Moe
    } else {
        Family::Mixtral
    };
    let mut config = common(family, model);
    let own = match family {
        Family::Mixtral => json!({
            "num_local_experts": model.num_local_experts,
            "head_dim": model.head_dim,
            "sliding_window": model.sliding_window,
            "router_jitter_noise": 0.0,
            // One width for all.
            "intermediate_size": model.expert_width(),
        }),
        Family::Qwen2Moe => json!({
            "num_experts": model.num_local_experts,
            "head_dim": model.head_dim,
            "norm_topk_prob": model.norm_topk_prob,
            "moe_intermediate_size": model.expert_width(),
            "shared_expert_intermediate_size": model.shared_expert_intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(model),
            "qkv_bias": model.attention_bias,
            "use_sliding_window": false,
        }),
        Family::Qwen3Moe => json!({
            "num_experts": model.num_local_experts,
            "head_dim": model.head_dim(),
            "norm_topk_prob": model.norm_topk_prob,
            "moe_intermediate_size": model.expert_width(),
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(model),
            "attention_bias": false,
            "use_sliding_window": model.sliding_window.is_some(),
            "sliding_window": model.sliding_window,
        }),
        Family::Olmoe => json!({
            "num_experts": model.num_local_experts,
            "norm_topk_prob": model.norm_topk_prob,
            "attention_bias": false,
            "clip_qkv": null,
            "intermediate_size": model.expert_width(),
        }),
        Family::DeepseekV3 => json!({
            "n_routed_experts": model.num_local_experts,
            "moe_intermediate_size": model.expert_width(),
            "n_shared_experts": model.n_shared_experts,
            "first_k_dense_replace": dense_layers(model).len(),
            "kv_lora_rank": model.kv_lora_rank,
            "q_lora_rank": model.q_lora_rank,
            "qk_nope_head_dim": model.qk_nope_head_dim,
            "qk_rope_head_dim": model.qk_rope_head_dim,
            "v_head_dim": model.v_head_dim,
            "rope_interleave": model.rope_interleave.unwrap_or(true),
            "attention_bias": model.attention_bias,
            "norm_topk_prob": model.norm_topk_prob,
            "routed_scaling_factor": model.routed_scaling_factor,
            "n_group": model.n_group,
            "topk_group": model.topk_group,
            "num_nextn_predict_layers": 0,
        }),
    };
    if let Value::Object(own) = own {
        config.extend(own);
    }
    if family == Family::DeepseekV3 {
        config.insert("output_router_logits".to_owned(), Value::Bool(false));
    } else {
        aux_loss(model, &mut config);
    }
    (family, config)
}

fn common(family: Family, model: &ModelConfig) -> Map<String, Value> {
    let mut rope = match model.rope_scaling {
        None => json!({ "rope_type": "default" }),
        Some(RopeScaling::Linear { factor }) => json!({ "rope_type": "linear", "factor": factor }),
        Some(RopeScaling::Yarn(yarn)) => {
            let mut rope = json!(yarn);
            rope["rope_type"] = Value::from("yarn");
            rope
        }
    };
    rope["rope_theta"] = Value::from(model.rope_theta);
    let config = json!({
        "architectures": [family.architecture()],
        "model_type": family.model_type(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "num_experts_per_tok": model.num_experts_per_tok,
        "hidden_act": match model.hidden_act {
            HiddenAct::Silu => "silu",
            HiddenAct::GeluPytorchTanh => "gelu_pytorch_tanh",
        },
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": rope,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "pad_token_id": model.pad_token_id,
        "bos_token_id": null,
        "eos_token_id": null,
        "attention_dropout": 0.0,
    });
    match config {
        Value::Object(config) => config,
        _ => Map::new(),
    }
}

/// The load-balancing loss over all layers, on if the model has it; one of another scope is not the hub's.
pub(super) fn aux_loss(model: &ModelConfig, config: &mut Map<String, Value>) {
    let coef = model.aux_loss_coef(AuxLossScope::Model);
    config.insert("output_router_logits".to_owned(), Value::Bool(coef > 0.0));
    if coef > 0.0 {
        config.insert("router_aux_loss_coef".to_owned(), Value::from(coef));
    }
}

fn dense_layers(model: &ModelConfig) -> Vec<usize> {
    (0..model.num_hidden_layers).filter(|&layer| !model.is_moe_layer(layer)).collect()
}

/// The model with one spelling of what has several.
pub(super) fn canonical(model: &ModelConfig) -> ModelConfig {
    let dense = dense_layers(model);
    ModelConfig {
        head_dim: model.kv_lora_rank.is_none().then(|| model.head_dim()),
        moe_intermediate_size: Some(model.expert_width()),
        intermediate_size: if dense.is_empty() { 0 } else { model.intermediate_size },
        rope_interleave: Some(model.rotary_pairs() == RotaryPairs::Adjacent),
        group_score_topk: if model.n_group == 1 { 0 } else { model.group_score_topk },
        // Softmax over all and normalised is softmax over the chosen.
        scoring_func: match model.scoring_func {
            ScoringFunc::Softmax if model.norm_topk_prob => ScoringFunc::SoftmaxPost,
            other => other,
        },
        qk_norm_scope: if model.use_qk_norm { model.qk_norm_scope } else { QkNormScope::Head },
        mlp_only_layers: dense,
        decoder_sparse_step: 1,
        first_k_dense_replace: 0,
        ..model.clone()
    }
}
