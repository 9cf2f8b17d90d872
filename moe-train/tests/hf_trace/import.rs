//! A hub folder of these tests as a checkpoint: what of a configuration and of names the fixtures need.

use std::fs;
use std::path::Path;

use moe_kernels::DType;
use moe_model::ModelConfig;
use moe_train::checkpoint::container::{Checkpoint, PendingCheckpoint, PieceSpec, PieceWriter};
use moe_train::checkpoint::{Meta, Weights};
use moe_train::optim::Moment;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

/// The model of a `config.json`.
fn model(config: &Value) -> ModelConfig {
    let family = config["model_type"].as_str().unwrap();
    let mut model = Map::new();
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "rms_norm_eps",
        "norm_topk_prob",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "n_shared_experts",
        "routed_scaling_factor",
        "sliding_window",
        "pad_token_id",
        "mlp_only_layers",
        "decoder_sparse_step",
        "tie_word_embeddings",
    ] {
        model.extend(
            config.get(key).filter(|value| !value.is_null()).map(|value| (key.to_owned(), value.clone())),
        );
    }
    let experts = ["num_local_experts", "num_experts", "n_routed_experts"];
    let experts = experts.into_iter().find_map(|key| config.get(key)).unwrap();
    model.insert("num_local_experts".to_owned(), experts.clone());
    let mut rope = config.get("rope_parameters").or(config.get("rope_scaling")).unwrap().clone();
    let mut rope_theta = config.get("rope_theta").cloned();
    if let Some(rope) = rope.as_object_mut() {
        rope_theta = rope_theta.or(rope.remove("rope_theta"));
        if let Some(kind) = rope.remove("type") {
            rope.insert("rope_type".to_owned(), kind);
        }
        if rope["rope_type"] != "default" {
            model.insert("rope_scaling".to_owned(), Value::Object(rope.clone()));
        }
    }
    model.insert("rope_theta".to_owned(), rope_theta.unwrap());
    if family == "qwen2_moe" || family == "qwen3_moe" {
        model.remove("sliding_window");
    }
    if config["output_router_logits"] == true {
        let aux = json!([{ "scope": "model", "coef": config["router_aux_loss_coef"] }]);
        model.insert("router_aux_losses".to_owned(), aux);
    }
    let own = match family {
        "mixtral" => json!({ "head_dim": config["head_dim"] }),
        "qwen2_moe" => json!({ "attention_bias": true, "scoring_func": "softmax" }),
        "qwen3_moe" => {
            json!({ "use_qk_norm": true, "scoring_func": "softmax", "head_dim": config["head_dim"] })
        }
        "olmoe" => json!({ "use_qk_norm": true, "qk_norm_scope": "projection", "scoring_func": "softmax" }),
        "deepseek_v3" => json!({ "moe_router_enable_expert_bias": true, "scoring_func": "sigmoid" }),
        other => panic!("{other}"),
    };
    model.extend(own.as_object().unwrap().clone());
    let model: ModelConfig = serde_json::from_value(Value::Object(model)).unwrap();
    model.check().unwrap();
    model
}

/// The name of a tensor here.
fn own_name(hub: &str) -> String {
    let name = hub.replace(".mlp.gate.", ".block_sparse_moe.gate.");
    if !name.contains(".experts.") {
        return name;
    }
    let projections = [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")];
    let name = projections.into_iter().fold(name, |name, (hub, own)| name.replace(hub, own));
    name.replace(".mlp.experts.", ".block_sparse_moe.experts.")
}

/// The weights of the hub folder `hub`, as a checkpoint in `root`.
pub fn weights(hub: &Path, root: &Path) -> Weights {
    let config = serde_json::from_slice(&fs::read(hub.join("config.json")).unwrap()).unwrap();
    let pending = PendingCheckpoint::create(root, 0).unwrap();
    let mut writer = PieceWriter::create(pending.folder(), 0).unwrap();
    for entry in fs::read_dir(hub).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if !file.starts_with("model") || !file.ends_with(".safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let dims = match *tensor.shape() {
                [n] => [1, n],
                [rows, cols] => [rows, cols],
                _ => panic!("{name}"),
            };
            let buffer = name.ends_with("e_score_correction_bias");
            let dtype = match tensor.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::Bf16,
                other => panic!("{name}: {other:?}"),
            };
            let spec = PieceSpec {
                tensor: own_name(name),
                kind: if buffer { "buffer" } else { Moment::Master.name() }.to_owned(),
                dtype,
                dims,
                rows: 0..dims[0],
                cols: 0..dims[1],
                part: 0..dims[0] * dims[1],
            };
            writer.write(spec, tensor.data()).unwrap();
        }
    }
    let meta = serde_json::to_value(Meta { model: model(&config), run: None }).unwrap();
    let path = pending.commit(vec![writer.finish().unwrap()], meta).unwrap();
    Weights::of(Checkpoint::open(&path).unwrap()).unwrap()
}
