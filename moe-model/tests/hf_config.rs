//! `config.json` of the hub's families: what is read, what is refused, and back.

use moe_model::ModelConfig;
use moe_model::config::{AuxLoss, AuxLossScope, QkNormScope, RopeScaling, ScoringFunc};
use moe_model::hf::{Family, FloatType, HubConfig, HubConfigError};
use serde_json::{Value, json};

/// What `save_pretrained` of transformers 5.24 writes of a small model of each family.
fn config(family: Family) -> Value {
    let mut config = json!({
        "architectures": [family.architecture()], "model_type": family.model_type(), "attention_dropout": 0.0,
        "bos_token_id": 1, "dtype": "float32", "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64,
        "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 128, "num_attention_heads": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2, "output_router_logits": true,
        "pad_token_id": null, "rms_norm_eps": 1e-6, "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
        "router_aux_loss_coef": 0.02, "tie_word_embeddings": false, "transformers_version": "5.24.0", "use_cache": true,
        "vocab_size": 257,
    });
    let own = match family {
        Family::Mixtral => json!({
            "head_dim": null, "num_local_experts": 8, "router_jitter_noise": 0.0, "sliding_window": null,
        }),
        Family::Qwen2Moe => json!({
            "decoder_sparse_step": 1, "layer_types": ["full_attention", "full_attention"], "max_window_layers": 28,
            "mlp_only_layers": [1], "moe_intermediate_size": 48, "norm_topk_prob": false, "num_experts": 8,
            "qkv_bias": true, "shared_expert_intermediate_size": 80, "sliding_window": 0, "use_sliding_window": false,
        }),
        Family::Qwen3Moe => json!({
            "attention_bias": false, "decoder_sparse_step": 2, "head_dim": 24, "mlp_only_layers": [],
            "moe_intermediate_size": 48, "norm_topk_prob": true, "num_local_experts": 8, "sliding_window": null,
            "use_sliding_window": false,
        }),
        Family::Olmoe => json!({
            "attention_bias": false, "clip_qkv": null, "norm_topk_prob": false, "num_experts": 8, "pad_token_id": 1,
        }),
        Family::DeepseekV3 => json!({
            "attention_bias": false, "first_k_dense_replace": 1, "head_dim": 8, "kv_lora_rank": 32,
            "moe_intermediate_size": 48, "n_group": 4, "n_routed_experts": 8, "n_shared_experts": 1,
            "norm_topk_prob": true, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
            "output_router_logits": false, "pretraining_tp": 1, "q_lora_rank": 24, "qk_head_dim": 24,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "rope_interleave": true, "routed_scaling_factor": 2.5,
            "topk_group": 2, "v_head_dim": 16, "router_aux_loss_coef": null,
        }),
    };
    set(&mut config, own);
    config
}

fn set(config: &mut Value, keys: Value) {
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
}

fn with(family: Family, keys: Value) -> Value {
    let mut config = config(family);
    set(&mut config, keys);
    config
}

fn parsed(config: &Value) -> HubConfig {
    HubConfig::parse(config).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn every_family_is_read() {
    for family in Family::ALL {
        let HubConfig { family: found, model, next_token_layers, .. } = parsed(&config(family));
        assert_eq!(found, family);
        assert_eq!(next_token_layers, usize::from(family == Family::DeepseekV3));
        assert_eq!((model.num_local_experts, model.num_experts_per_tok, model.rope_theta), (8, 2, 1e4));
        assert_eq!((model.rms_norm_eps, model.hidden_size, model.vocab_size), (1e-6, 64, 257));
        let losses = match family {
            Family::DeepseekV3 => vec![],
            _ => vec![AuxLoss { scope: AuxLossScope::Model, coef: 0.02 }],
        };
        assert_eq!(model.router_aux_losses, losses, "{family:?}");
        let moe: Vec<usize> = model.moe_layers().collect();
        let bias = [model.attention_bias, model.moe_router_enable_expert_bias, model.use_qk_norm];
        match family {
            Family::Mixtral => {
                assert_eq!((moe, bias), (vec![0, 1], [false; 3]));
                assert_eq!((model.scoring_func, model.norm_topk_prob), (ScoringFunc::SoftmaxPost, true));
                assert_eq!((model.head_dim(), model.expert_width(), model.pad_token_id), (16, 96, None));
            }
            Family::Qwen2Moe => {
                assert_eq!((moe, bias), (vec![0], [true, false, false]));
                assert_eq!((model.scoring_func, model.norm_topk_prob), (ScoringFunc::Softmax, false));
                assert_eq!((model.expert_width(), model.shared_expert_intermediate_size), (48, Some(80)));
            }
            Family::Qwen3Moe => {
                assert_eq!((moe, bias), (vec![1], [false, false, true]));
                assert_eq!((model.qk_norm_scope, model.norm_topk_prob), (QkNormScope::Head, true));
                assert_eq!((model.head_dim(), model.scoring_func), (24, ScoringFunc::Softmax));
            }
            Family::Olmoe => {
                assert_eq!((moe, bias), (vec![0, 1], [false, false, true]));
                assert_eq!((model.qk_norm_scope, model.pad_token_id), (QkNormScope::Projection, Some(1)));
                assert_eq!((model.norm_topk_prob, model.expert_width()), (false, 96));
            }
            Family::DeepseekV3 => {
                assert_eq!((moe, bias), (vec![1], [false, true, false]));
                assert_eq!((model.scoring_func, model.routed_scaling_factor), (ScoringFunc::Sigmoid, 2.5));
                assert_eq!((model.n_group, model.topk_group, model.group_score_topk), (4, 2, 2));
                let latent = model.latent_attention().unwrap();
                assert_eq!((latent.kv_lora_rank, latent.q_lora_rank, latent.v_head_dim), (32, Some(24), 16));
                assert_eq!((model.n_shared_experts, model.rope_interleave), (Some(1), Some(true)));
            }
        }
    }
}

#[test]
fn several_spellings_are_one() {
    let base = parsed(&config(Family::Qwen3Moe)).model;
    let mut old = config(Family::Qwen3Moe);
    for key in ["rope_parameters", "num_local_experts", "dtype"] {
        old.as_object_mut().unwrap().remove(key);
    }
    set(
        &mut old,
        json!({ "num_experts": 8, "rope_theta": 10000.0, "rope_scaling": null, "torch_dtype": "bfloat16" }),
    );
    assert_eq!(parsed(&old).model, base);
    set(
        &mut old,
        json!({ "n_routed_experts": 8, "rope_parameters": { "rope_theta": 10000, "rope_type": "default" } }),
    );
    assert_eq!(parsed(&old).model, base);

    let yarn = json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7,
        "mscale_all_dim": 0.9, "beta_fast": 16, "beta_slow": 0 });
    set(&mut old, json!({ "rope_parameters": null, "rope_scaling": yarn }));
    let mut new = yarn.clone();
    set(&mut new, json!({ "type": null, "rope_type": "yarn", "rope_theta": 10000.0 }));
    let read = parsed(&old).model;
    assert_eq!(read, parsed(&with(Family::Qwen3Moe, json!({ "rope_parameters": new }))).model);
    let Some(RopeScaling::Yarn(yarn)) = read.rope_scaling else { panic!("{read:?}") };
    assert_eq!((yarn.factor, yarn.original_max_position_embeddings, yarn.truncate), (4.0, 32, true));
    assert_eq!((yarn.mscale, yarn.mscale_all_dim), (Some(0.7), Some(0.9)));
    assert_eq!((yarn.beta_fast, yarn.beta_slow), (16.0, 1.0)); // zero is as good as unset
    let linear = json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.5, "rope_theta": 7.0 } });
    let read = parsed(&with(Family::Mixtral, linear)).model;
    assert_eq!((read.rope_scaling, read.rope_theta), (Some(RopeScaling::Linear { factor: 2.5 }), 7.0));
}

#[test]
fn what_is_absent_is_the_familys_default() {
    let without = |family, keys: &[&str]| {
        let mut config = config(family);
        keys.iter().for_each(|key| drop(config.as_object_mut().unwrap().remove(*key)));
        parsed(&config).model
    };
    let mixtral =
        without(Family::Mixtral, &["rope_parameters", "rms_norm_eps", "output_router_logits", "hidden_act"]);
    assert_eq!(
        (mixtral.rope_theta, mixtral.rms_norm_eps, mixtral.router_aux_loss_coef),
        (1e6, 1e-5, Some(0.0))
    );
    assert!(mixtral.router_aux_losses.is_empty());
    let olmoe = without(Family::Olmoe, &["pad_token_id", "num_key_value_heads", "router_aux_loss_coef"]);
    assert_eq!((olmoe.pad_token_id, olmoe.num_key_value_heads), (Some(1), 4));
    assert_eq!(olmoe.router_aux_losses[0].coef, 0.01);
    assert_eq!(parsed(&with(Family::Olmoe, json!({ "pad_token_id": null }))).model.pad_token_id, None);
    assert!(without(Family::Qwen2Moe, &["qkv_bias"]).attention_bias);
    let window = json!({ "sliding_window": 4096, "use_sliding_window": false });
    assert_eq!(parsed(&with(Family::Qwen3Moe, window)).model.sliding_window, None);
    let window = json!({ "sliding_window": 64, "use_sliding_window": true });
    assert_eq!(parsed(&with(Family::Qwen3Moe, window)).model.sliding_window, Some(64));
    assert_eq!(parsed(&with(Family::Mixtral, json!({ "sliding_window": 5 }))).model.sliding_window, Some(5));
    let mut window = with(Family::Qwen3Moe, json!({ "use_sliding_window": true }));
    assert_eq!(parsed(&window).model.sliding_window, None);
    window.as_object_mut().unwrap().remove("sliding_window");
    assert_eq!(parsed(&window).model.sliding_window, Some(4096));
}

#[test]
fn what_would_change_the_mathematics_is_refused_by_name() {
    use Family::{DeepseekV3, Mixtral, Olmoe, Qwen2Moe, Qwen3Moe};
    for (family, keys, said) in [
        (
            Mixtral,
            json!({ "model_type": "llama" }),
            "model_type = \"llama\" is not supported: it must be one of mixtral",
        ),
        (Mixtral, json!({ "model_type": null }), "model_type = null is not supported"),
        (
            Mixtral,
            json!({ "architectures": ["MixtralForTokenClassification"] }),
            "architectures = [\"MixtralFor",
        ),
        (Mixtral, json!({ "attention_dropout": 0.1 }), "attention_dropout = 0.1 is not supported"),
        (Mixtral, json!({ "hidden_act": "relu" }), "hidden_act = relu is not supported: silu and"),
        (Mixtral, json!({ "router_jitter_noise": 0.1 }), "router_jitter_noise = 0.1 is not supported"),
        (Mixtral, json!({ "quantization_config": {} }), "quantization_config = {} is not supported"),
        (Mixtral, json!({ "attention_bias": true }), "attention_bias = true is not known in config.json"),
        (Mixtral, json!({ "vocab_size": null }), "vocab_size is missing"),
        (Mixtral, json!({ "vocab_size": -1 }), "vocab_size = -1, but it must be a whole number"),
        (Mixtral, json!({ "vocab_size": 1e99 }), "vocab_size = 1e+99, but it must be a whole number"),
        (Mixtral, json!({ "vocab_size": 0 }), "vocab_size = 0, but vocab_size must be from 1"),
        (Mixtral, json!({ "rms_norm_eps": "small" }), "rms_norm_eps = \"small\", but it must be a number"),
        (
            Mixtral,
            json!({ "tie_word_embeddings": 1 }),
            "tie_word_embeddings = 1, but it must be true or false",
        ),
        (
            Mixtral,
            json!({ "num_experts": 4 }),
            "num_local_experts = 8 and num_experts = 4 say different things",
        ),
        (
            Mixtral,
            json!({ "num_attention_heads": 3 }),
            "hidden_size must be a multiple of num_attention_heads",
        ),
        (
            Mixtral,
            json!({ "rope_theta": 5.0 }),
            "rope_theta = 5.0 and rope_parameters.rope_theta = 10000.0 say different",
        ),
        (
            Mixtral,
            json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8.0 } }),
            "rope_parameters.rope_type = llama3",
        ),
        (
            Mixtral,
            json!({ "rope_scaling": { "type": "dynamic", "factor": 8.0 } }),
            "rope_scaling.rope_type = dynamic",
        ),
        (
            Mixtral,
            json!({ "rope_parameters": { "rope_type": "linear" } }),
            "factor of rope_type linear is missing",
        ),
        (
            Mixtral,
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 2, "beta": 1 } }),
            "beta = 1 is not known in rope_parameters",
        ),
        (
            Mixtral,
            json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }),
            "partial_rotary_factor = 0.5 is not",
        ),
        (
            Qwen3Moe,
            json!({ "rope_scaling": { "rope_theta": 7e4 } }),
            "rope_scaling.rope_theta = 70000.0 and rope_parameters.rope_theta = 10000.0 say different",
        ),
        (
            Mixtral,
            json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }),
            "rope_scaling = Some(Linear { factor: 2.0 }) and rope_parameters = None say different",
        ),
        (
            Mixtral,
            json!({ "rope_scaling": { "type": "linear", "rope_type": "yarn" } }),
            "rope_type = \"yarn\" and type = \"linear\" say different",
        ),
        (
            Mixtral,
            json!({ "torch_dtype": "bfloat16" }),
            "dtype = String(\"float32\") and torch_dtype = String(\"bfloat16\") say different",
        ),
        (Mixtral, json!({ "_window": 4 }), "_window = 4 is not known in config.json"),
        (
            Mixtral,
            json!({ "tie_word_embeddings": null }),
            "tie_word_embeddings = null, but it must be true or",
        ),
        (Mixtral, json!({ "rope_parameters": 3 }), "rope_parameters = 3, but it must be an object"),
        (Qwen2Moe, json!({ "use_sliding_window": true }), "use_sliding_window = true is not supported"),
        (
            Qwen2Moe,
            json!({ "layer_types": ["full_attention", "sliding_attention"] }),
            "layer_types = [\"full_attention\"",
        ),
        (Qwen2Moe, json!({ "layer_types": ["full_attention"] }), "layer_types = [\"full_attention\"] is not"),
        (Qwen2Moe, json!({ "mlp_only_layers": [1, -1] }), "mlp_only_layers = [1,-1], but it must be a list"),
        (
            Qwen3Moe,
            json!({ "attention_bias": true }),
            "attention_bias = true is not supported: its output projection",
        ),
        (Olmoe, json!({ "clip_qkv": 8.0 }), "clip_qkv = 8.0 is not supported"),
        (Olmoe, json!({ "attention_bias": true }), "attention_bias = true is not supported"),
        (Olmoe, json!({ "head_dim": 32 }), "head_dim = 32 is not supported: heads share the width"),
        (Olmoe, json!({ "pad_token_id": 257 }), "pad_token_id = 257, but"),
        (
            DeepseekV3,
            json!({ "topk_method": "greedy" }),
            "topk_method = \"greedy\" is not supported: noaux_tc is",
        ),
        (
            DeepseekV3,
            json!({ "scoring_func": "softmax" }),
            "scoring_func = \"softmax\" is not supported: sigmoid is",
        ),
        (
            DeepseekV3,
            json!({ "head_dim": 24 }),
            "head_dim = 24 is not supported: it must be qk_rope_head_dim",
        ),
        (DeepseekV3, json!({ "qk_head_dim": 16 }), "qk_head_dim = 16 is not supported"),
        (
            DeepseekV3,
            json!({ "rope_interleave": null }),
            "rope_interleave = null, but it must be true or false",
        ),
        (
            DeepseekV3,
            json!({ "norm_topk_prob": null }),
            "norm_topk_prob = null, but it must be true or false",
        ),
        (DeepseekV3, json!({ "moe_layer_freq": 2 }), "moe_layer_freq = 2 is not supported"),
        (DeepseekV3, json!({ "output_router_logits": true }), "output_router_logits = true is not supported"),
        (
            DeepseekV3,
            json!({ "num_key_value_heads": 2 }),
            "num_key_value_heads other than num_attention_heads",
        ),
        (
            DeepseekV3,
            json!({ "num_mtp_layers": 2 }),
            "num_nextn_predict_layers = 1 and num_mtp_layers = 2 say",
        ),
    ] {
        let error = HubConfig::parse(&with(family, keys)).unwrap_err().to_string();
        assert!(error.starts_with(said), "{said:?}: {error:?}");
    }
    assert_eq!(HubConfig::parse(&json!([])), Err(HubConfigError::NoObject));
    let mut absent = config(DeepseekV3);
    absent.as_object_mut().unwrap().remove("q_lora_rank");
    assert_eq!(HubConfig::parse(&absent), Err(HubConfigError::Missing { key: "q_lora_rank" }));
}

#[test]
fn a_model_goes_back_to_its_family() {
    for family in Family::ALL {
        let read = parsed(&config(family));
        // As it came.
        assert_eq!(read.with_model(&read.model).unwrap().to_json(FloatType::F32), config(family));
        assert_eq!(read.to_json(FloatType::Bf16)["dtype"], "bfloat16");
        let old = parsed(&with(family, json!({ "dtype": null, "torch_dtype": "float32" })));
        let both = parsed(&with(family, json!({ "torch_dtype": "float32" })));
        for written in [old, both].map(|config| config.to_json(FloatType::Bf16)) {
            assert_eq!([&written["dtype"], &written["torch_dtype"]], ["bfloat16"; 2]);
        }
        // Without what it came from.
        let made = HubConfig::of_model(&read.model).unwrap();
        assert_eq!(made.family, family);
        let again = parsed(&made.to_json(FloatType::F32));
        assert_eq!(
            again.model.first_difference(&read.model, |key| {
                // Said in another way.
                ["head_dim", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"].contains(&key)
            }),
            None,
            "{family:?}"
        );
        assert!(again.model.moe_layers().eq(read.model.moe_layers()));
        assert_eq!(again.model.head_dim(), read.model.head_dim());

        // What training may change, and what it may not.
        let trained = ModelConfig { router_z_loss_coef: 0.5, initializer_range: 1.0, ..read.model.clone() };
        read.with_model(&trained).unwrap();
        let other = ModelConfig { rope_theta: 7.0, ..read.model.clone() };
        let error = read.with_model(&other).unwrap_err().to_string();
        assert!(error.contains("rope_theta is 7.0 here and 10000.0 there"), "{error}");
    }
    let read = parsed(&config(Family::Mixtral));
    let off =
        ModelConfig { router_aux_loss_coef: Some(0.0), router_aux_losses: vec![], ..read.model.clone() };
    let written = read.with_model(&off).unwrap().to_json(FloatType::F32);
    assert_eq!(written["output_router_logits"], false);
    let more = vec![AuxLoss { scope: AuxLossScope::Model, coef: 0.5 }];
    let written = read.with_model(&ModelConfig { router_aux_losses: more, ..read.model.clone() }).unwrap();
    assert_eq!(written.to_json(FloatType::F32)["router_aux_loss_coef"], 0.5);
}

/// Softmax over all experts, normalised over the chosen, is softmax over the chosen.
#[test]
fn a_family_has_what_is_the_same_in_another_spelling() {
    let mixtral = parsed(&config(Family::Mixtral)).model;
    let softmax = ModelConfig { scoring_func: ScoringFunc::Softmax, ..mixtral.clone() };
    assert_eq!(HubConfig::of_model(&softmax).unwrap().family, Family::Mixtral);
    let normed = ModelConfig { use_qk_norm: true, ..mixtral };
    assert_eq!(HubConfig::of_model(&normed).unwrap().family, Family::Qwen3Moe);
    let plain = ModelConfig { norm_topk_prob: false, ..softmax };
    assert!(HubConfig::of_model(&plain).is_err());
}

/// The published sizes; transformers makes models of as many parameters of the same configurations.
#[test]
fn published_models_have_as_many_parameters_as_in_transformers() {
    let model = |family, sizes: [usize; 7], own: Value| {
        let [vocab, hidden, intermediate, layers, heads, kv_heads, chosen] = sizes;
        let mut config = with(
            family,
            json!({ "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                "num_experts_per_tok": chosen, "mlp_only_layers": null, "decoder_sparse_step": null,
                "layer_types": null }),
        );
        set(&mut config, own);
        config.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        if family == Family::DeepseekV3 {
            set(&mut config, json!({ "head_dim": 64, "qk_head_dim": 192 }));
        }
        parsed(&config).model.parameters()
    };
    let experts = |family, n: usize, width: usize, more: Value| {
        let key = if family == Family::Qwen3Moe { "num_local_experts" } else { "num_experts" };
        let mut own = json!({ "moe_intermediate_size": width });
        own[key] = n.into();
        set(&mut own, more);
        own
    };
    use Family::{DeepseekV3, Mixtral, Olmoe, Qwen2Moe, Qwen3Moe};
    let mixtral = json!({ "num_local_experts": 8 });
    assert_eq!(model(Mixtral, [32000, 4096, 14336, 32, 32, 8, 2], mixtral.clone()), 46_702_792_704);
    assert_eq!(model(Mixtral, [32000, 6144, 16384, 56, 48, 8, 2], mixtral), 140_620_634_112);
    let own = experts(Qwen2Moe, 60, 1408, json!({ "shared_expert_intermediate_size": 5632 }));
    assert_eq!(model(Qwen2Moe, [151936, 2048, 5632, 24, 16, 16, 4], own), 14_315_784_192);
    let own = experts(Qwen2Moe, 64, 2560, json!({ "shared_expert_intermediate_size": 20480 }));
    assert_eq!(model(Qwen2Moe, [151936, 3584, 18944, 28, 28, 4, 8], own), 57_408_658_944);
    let own = experts(Qwen3Moe, 128, 768, json!({ "head_dim": 128 }));
    assert_eq!(model(Qwen3Moe, [151936, 2048, 6144, 48, 32, 4, 8], own), 30_532_122_624);
    let own = json!({ "num_experts": 64 });
    assert_eq!(model(Olmoe, [50304, 2048, 1024, 16, 16, 16, 8], own), 6_919_161_856);
    let own = json!({ "n_routed_experts": 256, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128 });
    assert_eq!(model(DeepseekV3, [129280, 7168, 18432, 61, 128, 128, 8], own), 671_026_404_352);
}

#[test]
fn a_model_that_no_family_has_is_named() {
    let model = |family| parsed(&config(family)).model;
    let mixtral = || model(Family::Mixtral);
    for (model, said) in [
        (ModelConfig { mlp_bias: true, ..mixtral() }, "mlp_bias is true here and false there"),
        (ModelConfig { expert_mlp_bias: true, ..mixtral() }, "expert_mlp_bias is true here"),
        (ModelConfig { attention_bias: true, ..mixtral() }, "cannot be a mixtral of the hub"),
        (ModelConfig { norm_topk_prob: false, ..mixtral() }, "norm_topk_prob is false here and true there"),
        (ModelConfig { first_k_dense_replace: 1, ..mixtral() }, "is 96 here and 0 there"),
        (
            ModelConfig { routed_scaling_factor: 2.0, ..model(Family::Qwen3Moe) },
            "routed_scaling_factor is 2.0 here",
        ),
        (
            ModelConfig { n_shared_experts: Some(1), ..mixtral() },
            "n_shared_experts is 1 here and absent there",
        ),
        (
            ModelConfig { group_score_topk: 1, ..model(Family::DeepseekV3) },
            "group_score_topk is 1 here and 2 there",
        ),
        (
            ModelConfig { mlp_only_layers: vec![1], first_k_dense_replace: 0, ..model(Family::DeepseekV3) },
            "mlp_only_layers",
        ),
    ] {
        let error = HubConfig::of_model(&model).unwrap_err().to_string();
        assert!(error.contains(said), "{said:?}: {error:?}");
    }
}
