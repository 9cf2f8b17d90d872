//! From the keys of each family to a model.

use serde_json::{Map, Value, json};

use super::keys::{Keys, agreed};
use super::{HubConfigError, rope};
use crate::ModelConfig;
use crate::config::{AuxLoss, AuxLossScope, QkNormScope, ScoringFunc};
use crate::hf::Family;

type Result<T> = std::result::Result<T, HubConfigError>;

/// What the experts are called, the spelling of the newest version first.
const EXPERTS: [&str; 3] = ["num_local_experts", "num_experts", "n_routed_experts"];

/// What the type of the weights is called, by transformers 5 and 4.
pub(super) const DTYPES: [&str; 2] = ["dtype", "torch_dtype"];

/// Keys of every configuration that change nothing that is computed of given tokens.
const WITHOUT_EFFECT: [&str; 32] = [
    "model_type",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "max_length",
];

/// Family, model, and layers behind it that predict further tokens.
pub(super) fn read(config: &Map<String, Value>) -> Result<(Family, ModelConfig, usize)> {
    let found = config.get("model_type").unwrap_or(&Value::Null);
    let family =
        found.as_str().and_then(|name| Family::ALL.into_iter().find(|family| family.model_type() == name));
    let family = family.ok_or_else(|| HubConfigError::Family { found: found.to_string() })?;
    let mut keys = Keys::new(config);
    keys.ignore(&WITHOUT_EFFECT);
    keys.only("architectures", "only models that predict the next token are", |value| {
        value.as_array().is_some_and(|names| names.iter().any(|name| name == family.architecture()))
    })?;
    keys.only("quantization_config", "save the model in a type of floats first", |_| false)?;
    keys.only("attention_dropout", "there is no dropout", is_zero)?;
    // Weights are read in whatever type they have; which one is said must be clear all the same.
    agreed(&DTYPES.map(|key| (key, keys.value(key))))?;

    let mut model = common(&mut keys, family)?;
    let mut next_token_layers = 0;
    match family {
        Family::Mixtral => mixtral(&mut keys, &mut model)?,
        Family::Qwen2Moe | Family::Qwen3Moe => qwen(&mut keys, family, &mut model)?,
        Family::Olmoe => olmoe(&mut keys, &mut model)?,
        Family::DeepseekV3 => next_token_layers = deepseek(&mut keys, &mut model)?,
    }
    keys.finish("config.json")?;
    model.check()?;
    Ok((family, model, next_token_layers))
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

/// What all families have, with the defaults of this one.
fn common(keys: &mut Keys<'_>, family: Family) -> Result<ModelConfig> {
    let heads = keys.needed("num_attention_heads")?;
    let (theta, eps, pad) = match family {
        Family::Mixtral => (1e6, 1e-5, None),
        Family::Olmoe => (1e4, 1e-5, Some(1)),
        Family::Qwen2Moe | Family::Qwen3Moe | Family::DeepseekV3 => (1e4, 1e-6, None),
    };
    let act = keys.text("hidden_act")?.unwrap_or("silu");
    if !["silu", "gelu_pytorch_tanh"].contains(&act) {
        let (key, value) = ("hidden_act".to_owned(), act.to_owned());
        return Err(HubConfigError::Unsupported { key, value, why: "silu and gelu_pytorch_tanh are" });
    }
    let model = json!({
        "vocab_size": keys.needed("vocab_size")?,
        "hidden_size": keys.needed("hidden_size")?,
        "intermediate_size": keys.needed("intermediate_size")?,
        "num_hidden_layers": keys.needed("num_hidden_layers")?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("num_key_value_heads")?.unwrap_or(heads),
        "num_local_experts": keys.spelled(&EXPERTS)?,
        "num_experts_per_tok": keys.needed("num_experts_per_tok")?,
        "rms_norm_eps": keys.number("rms_norm_eps")?.unwrap_or(eps),
        "initializer_range": keys.number("initializer_range")?.unwrap_or(0.02),
        "tie_word_embeddings": keys.flag("tie_word_embeddings")?.unwrap_or(false),
        "hidden_act": act,
    });
    let mut model: ModelConfig = serde_json::from_value(model).map_err(|error| HubConfigError::Value {
        key: "config.json".to_owned(),
        value: error.to_string(),
        wanted: "a model",
    })?;
    // Absent is the family's default, null none.
    model.pad_token_id = match keys.has("pad_token_id") {
        true => keys.size("pad_token_id")?,
        false => pad,
    };
    (model.rope_theta, model.rope_scaling) = rope::read(keys, theta)?;
    model.router_aux_loss_coef = Some(0.0);
    Ok(model)
}

/// A head's width, where it may be given.
fn head_dim(keys: &mut Keys<'_>, model: &mut ModelConfig) -> Result<()> {
    model.head_dim = keys.size("head_dim")?;
    Ok(())
}

/// The load-balancing loss over all layers, if it is on.
fn aux_loss(keys: &mut Keys<'_>, default: f64, model: &mut ModelConfig) -> Result<()> {
    let coef = keys.number("router_aux_loss_coef")?.unwrap_or(default);
    if keys.flag("output_router_logits")?.unwrap_or(false) {
        model.router_aux_loss_coef = None;
        model.router_aux_losses = vec![AuxLoss { scope: AuxLossScope::Model, coef }];
    }
    Ok(())
}

fn mixtral(keys: &mut Keys<'_>, model: &mut ModelConfig) -> Result<()> {
    head_dim(keys, model)?;
    aux_loss(keys, 0.001, model)?;
    model.scoring_func = ScoringFunc::SoftmaxPost;
    model.sliding_window = keys.size("sliding_window")?;
    let why = "transformers disturbs what experts see, too; set model.router_jitter_noise of a run instead";
    keys.only("router_jitter_noise", why, is_zero)
}

fn qwen(keys: &mut Keys<'_>, family: Family, model: &mut ModelConfig) -> Result<()> {
    head_dim(keys, model)?;
    aux_loss(keys, 0.001, model)?;
    model.scoring_func = ScoringFunc::Softmax;
    model.norm_topk_prob = keys.flag("norm_topk_prob")?.unwrap_or(false);
    model.moe_intermediate_size = Some(keys.needed("moe_intermediate_size")?);
    model.decoder_sparse_step = keys.size("decoder_sparse_step")?.unwrap_or(1);
    model.mlp_only_layers = keys.sizes("mlp_only_layers")?.unwrap_or_default();
    keys.ignore(&["max_window_layers"]);
    if family == Family::Qwen3Moe {
        model.use_qk_norm = true;
        // Absent is transformers' default, null none.
        let window = match keys.has("sliding_window") {
            true => keys.size("sliding_window")?,
            false => Some(4096),
        };
        let slides = keys.flag("use_sliding_window")?.unwrap_or(false);
        model.sliding_window = window.filter(|_| slides);
        return keys.only("attention_bias", "its output projection would have one", |value| value == false);
    }
    keys.ignore(&["sliding_window"]);
    model.shared_expert_intermediate_size = Some(keys.needed("shared_expert_intermediate_size")?);
    model.attention_bias = keys.flag("qkv_bias")?.unwrap_or(true);
    keys.only("use_sliding_window", "some layers would have a window and others not", |value| {
        value == false
    })?;
    keys.only("layer_types", "each layer must be there, and see all tokens before its own", |value| {
        let whole = |types: &Vec<Value>| types.iter().all(|kind| kind == "full_attention");
        value.as_array().is_some_and(|types| types.len() == model.num_hidden_layers && whole(types))
    })
}

fn olmoe(keys: &mut Keys<'_>, model: &mut ModelConfig) -> Result<()> {
    keys.only("head_dim", "heads share the width of the model", |value| *value == model.head_dim())?;
    aux_loss(keys, 0.01, model)?;
    model.scoring_func = ScoringFunc::Softmax;
    model.norm_topk_prob = keys.flag("norm_topk_prob")?.unwrap_or(false);
    (model.use_qk_norm, model.qk_norm_scope) = (true, QkNormScope::Projection);
    keys.only("clip_qkv", "queries, keys and values are not clipped", |_| false)?;
    keys.only("attention_bias", "its output projection would have one", |value| value == false)
}

/// Returns the layers that predict further tokens.
fn deepseek(keys: &mut Keys<'_>, model: &mut ModelConfig) -> Result<usize> {
    model.scoring_func = ScoringFunc::Sigmoid;
    model.moe_router_enable_expert_bias = true;
    model.moe_intermediate_size = Some(keys.needed("moe_intermediate_size")?);
    model.n_shared_experts = Some(keys.needed("n_shared_experts")?);
    model.first_k_dense_replace = keys.needed("first_k_dense_replace")?;
    model.kv_lora_rank = Some(keys.needed("kv_lora_rank")?);
    // Absent is not null, which is no latent.
    model.q_lora_rank = match keys.has("q_lora_rank") {
        true => keys.size("q_lora_rank")?,
        false => return Err(HubConfigError::Missing { key: "q_lora_rank" }),
    };
    model.qk_nope_head_dim = Some(keys.needed("qk_nope_head_dim")?);
    model.qk_rope_head_dim = Some(keys.needed("qk_rope_head_dim")?);
    model.v_head_dim = Some(keys.needed("v_head_dim")?);
    model.rope_interleave = Some(keys.flag("rope_interleave")?.unwrap_or(true));
    model.attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
    model.norm_topk_prob = keys.flag("norm_topk_prob")?.unwrap_or(true);
    model.routed_scaling_factor = keys.number("routed_scaling_factor")?.unwrap_or(2.5);
    (model.n_group, model.topk_group) = (keys.needed("n_group")?, keys.needed("topk_group")?);
    keys.only("topk_method", "noaux_tc is", |value| value == "noaux_tc")?;
    keys.only("scoring_func", "sigmoid is", |value| value == "sigmoid")?;
    keys.only("moe_layer_freq", "all layers behind the first dense ones have experts", |value| value == 1)?;
    keys.only("output_router_logits", "transformers takes no load-balancing loss of it", |value| {
        value == false
    })?;
    // What transformers makes of other keys.
    let (rotated, head) = (model.rotary_dim(), model.latent_attention().map(|latent| latent.qk_head_dim()));
    keys.only("head_dim", "it must be qk_rope_head_dim", |value| *value == rotated)?;
    keys.only("qk_head_dim", "it must be qk_nope_head_dim + qk_rope_head_dim", |value| {
        head.is_some_and(|head| *value == head)
    })?;
    // Losses of DeepSeek's own training code, which transformers does not take either.
    keys.ignore(&["aux_loss_alpha", "seq_aux", "ep_size", "router_aux_loss_coef"]);
    keys.spelled(&["num_nextn_predict_layers", "num_mtp_layers"]).or_else(|error| match error {
        HubConfigError::Missing { .. } => Ok(1),
        other => Err(other),
    })
}
