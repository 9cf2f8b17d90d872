//! The way of a model of the hub through this house, by its commands: in, trained on under a folding, out again, and the same
//! logits on both sides. docs/hugging_face.md goes the same way with transformers at both ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use moe_model::ModelConfig;
use moe_model::hf::{FloatType, HubConfig, HubNames, WritePlan};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Value, json};

/// A small Qwen2-MoE for bytes, some text and the configuration of a run without a `[model]`.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("hub")).unwrap();
        let config = json!({
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 257, "hidden_size": 24,
            "intermediate_size": 20, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 3, "mlp_only_layers": [1], "decoder_sparse_step": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": false,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000.0, "max_position_embeddings": 64,
            "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": false, "tie_word_embeddings": false,
            "output_router_logits": true, "router_aux_loss_coef": 0.01, "initializer_range": 0.02,
            "attention_dropout": 0.0, "bos_token_id": null, "eos_token_id": 2, "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0", "use_cache": true,
        });
        fs::write(place.path("hub/config.json"), config.to_string()).unwrap();
        fs::write(place.path("hub/generation_config.json"), r#"{"eos_token_id": 2}"#).unwrap();
        let HubConfig { family, model, .. } = HubConfig::parse(&config).unwrap();
        let names = HubNames::new(family, &model).unwrap();
        let plan = WritePlan::new(names.tensors().iter().map(|tensor| (tensor, FloatType::Bf16)), 40_000);
        let mut state = 1u64;
        plan.write::<moe_model::hf::WeightsError>(&place.path("hub"), |tensor, sink| {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f64 / f64::from(1u32 << 24) - 0.5
            };
            let norm = tensor.hub.contains("norm");
            let values = (0..tensor.len()).map(|_| if norm { 1.0 + 0.2 * next() } else { 0.4 * next() });
            sink.put(&values.collect::<Vec<f64>>())
        })
        .unwrap();

        let run = "
            [parallel]
            world_size = 4
            tp = 2
            ep = 4

            [train]
            dtype = 'f64'
            steps = 3
            global_batch_size = 4
            sequence_length = 24
            output = 'run'
            init_checkpoint = 'imported/step-0'

            [optimizer]
            lr = 1e-3

            [data]
            files = ['text-*.txt']
            held_out = 0.4

            [sample]
            tokens = 2
        ";
        fs::write(place.path("run.toml"), run).unwrap();
        for file in 0..6usize {
            let words = (0..150 + 20 * file).map(|n| ["rank ", "fold ", "expert "][n * (n + file) % 7 % 3]);
            fs::write(place.path(&format!("text-{file}.txt")), words.collect::<String>()).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Status, and what was said.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
        let output = command.args(arguments).current_dir(self.0.path()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(said).unwrap())
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let (status, said) = self.run(arguments);
        assert_eq!(status, 0, "{arguments:?}: {said}");
        said
    }

    #[track_caller]
    fn refused(&self, status: i32, arguments: &[&str], parts: &[&str]) {
        let (ended, said) = self.run(arguments);
        assert_eq!(ended, status, "{arguments:?}: {said}");
        for part in parts {
            assert!(said.contains(part), "{part:?} is not in {said}");
        }
    }

    /// The losses of a run's steps.
    fn losses(&self, run: &str) -> Vec<f64> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter_map(|line| line.get("loss")?.as_f64()).collect()
    }

    /// The logits of `checkpoint` on some tokens.
    fn logits(&self, checkpoint: &str, more: &[&str]) -> Vec<f64> {
        let ids: Vec<u8> = (0..48i64).flat_map(|n| (n * n % 257).to_le_bytes()).collect();
        let tokens = TensorView::new(Dtype::I64, vec![2, 24], &ids).unwrap();
        serialize_to_file([("input_ids", tokens)], None, &self.path("tokens.safetensors")).unwrap();
        let trace = [
            "trace",
            "--checkpoint",
            checkpoint,
            "--tokens",
            "tokens.safetensors",
            "--out",
            "trace.safetensors",
        ];
        self.ok(&[&trace[..], more].concat());
        let bytes = fs::read(self.path("trace.safetensors")).unwrap();
        fs::remove_file(self.path("trace.safetensors")).unwrap();
        let trace = SafeTensors::deserialize(&bytes).unwrap();
        let logits = trace.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [2, 24, 257]);
        logits.data().chunks(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect()
    }
}

fn model(path: &Path) -> ModelConfig {
    moe_train::run::open_weights(path).unwrap().model().clone()
}

fn assert_close(a: &[f64], b: &[f64]) {
    let largest = b.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    assert!(largest > 0.0 && a.len() == b.len());
    let worst = a.iter().zip(b).fold(0.0, |m: f64, (x, y)| m.max((x - y).abs()));
    assert!(worst <= 1e-10 * largest, "{worst:e} of {largest:e}");
}

#[test]
fn a_model_comes_in_is_trained_under_a_folding_and_goes_out() {
    let place = Place::new();
    let said = place.ok(&["import", "hub", "imported"]);
    assert!(said.contains("checkpoint imported/step-0"), "{said}");
    assert!(place.ok(&["checkpoint", "verify", "imported/step-0"]).contains("whole"));
    assert_eq!(place.logits("imported/step-0", &[]), place.logits("hub", &[]));

    // The model is that of the weights; from the checkpoint, or from the folder under another folding.
    let said = place.ok(&["train", "run.toml"]);
    assert!(said.contains("starting from the weights of imported/step-0"), "{said}");
    let other = [
        "--set",
        "parallel.tp=1",
        "--set",
        "parallel.ep=2",
        "--set",
        "parallel.pp=2",
        "--set",
        "train.output=other",
    ];
    place.ok(&[&["train", "run.toml", "--set", "train.init_checkpoint=hub"], &other[..]].concat());
    let losses = place.losses("run");
    assert_eq!(losses.len(), 3);
    assert_close(&place.losses("other"), &losses);
    assert_eq!(model(&place.path("run")), model(&place.path("hub")));

    // What a run starts from need not be there when it goes on.
    fs::rename(place.path("imported"), place.path("gone")).unwrap();
    place.ok(&["train", "run/config.toml", "--resume", "--set", "train.steps=5", "--set", "parallel.ep=2"]);
    fs::rename(place.path("gone"), place.path("imported")).unwrap();

    // Out in doubles: the weights to the bit. Out as it came: rounded to bf16.
    place.ok(&["export", "run", "double", "--dtype", "f64"]);
    place.ok(&["export", "run", "out", "--max-shard-size", "30KB"]);
    let trained = place.logits("run", &[]);
    assert_eq!(place.logits("double", &[]), trained);
    assert_close(&place.logits("double", &["--world-size", "4", "--tp", "2", "--ep", "4"]), &trained);
    let rounded = place.logits("out", &[]);
    assert!(rounded != trained && rounded != place.logits("hub", &[]));
    for folder in ["run/hub", "double", "out"] {
        assert!(place.path(folder).join("generation_config.json").is_file(), "{folder}");
    }
    let config = |folder: &str| -> Value {
        serde_json::from_slice(&fs::read(place.path(folder).join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(config("out"), config("hub"));
    assert_eq!(config("double")["torch_dtype"], "float64");
    assert!(place.path("out/model.safetensors.index.json").is_file());
    place.refused(4, &["export", "run", "out"], &["out exists already and is not overwritten"]);
}

#[test]
fn a_model_that_is_given_beside_weights_must_be_theirs() {
    let place = Place::new();
    place.ok(&["import", "hub", "imported", "--dtype", "f64"]);
    let train = |more: &[&'static str]| [&["train", "run.toml", "--set", "train.steps=1"], more].concat();

    // What acts in training alone may be another.
    place.ok(&train(&[
        "--set",
        "model.router_z_loss_coef=0.001",
        "--set",
        "model.router_aux_loss_coef=0.02",
    ]));
    let resolved = fs::read_to_string(place.path("run/config.toml")).unwrap();
    let resolved: toml::Table = resolved.parse().unwrap();
    assert_eq!(resolved["model"]["router_aux_loss_coef"].as_float(), Some(0.02));
    assert!(!resolved["model"].as_table().unwrap().contains_key("router_aux_losses"));
    assert_eq!(resolved["model"]["num_local_experts"].as_integer(), Some(8));

    let output = ["--set", "train.output=other"];
    place.refused(
        4,
        &[&train(&["--set", "model.num_experts_per_tok=1"])[..], &output].concat(),
        &["imported/step-0 is of another model: num_experts_per_tok is 2 there and 1 here"],
    );
    place.refused(
        2,
        &[&train(&["--set", "model.num_expert=1"])[..], &output].concat(),
        &["unknown key \"num_expert\" in [model]"],
    );
    place.refused(
        2,
        &[&train(&["--set", "train.init_checkpoint=nothing"])[..], &output].concat(),
        &["[model] is not complete, and train.init_checkpoint = \"nothing\" cannot fill it up"],
    );
    assert!(!place.path("other").exists());
    place.refused(2, &["eval", "imported/step-0"], &["--text is needed: imported/step-0 belongs to no run"]);
    place.refused(4, &["import", "text-0.txt", "x"], &["cannot read text-0.txt/config.json"]);
    place.refused(2, &["export", "run", "x", "--max-shard-size", "5TB"], &["a number of bytes above 0"]);
}
