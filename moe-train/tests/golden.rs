//! Two training steps against PyTorch in float64 (`fixtures/make_golden*.py`).

mod common;

use common::{Outcome, assert_equal};
use moe_model::ModelConfig;
use moe_train::schedule::{DecayStyle, LrShape};
use serde_json::Value;

#[test]
fn two_steps_equal_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden.json")).unwrap();
    for run in golden["runs"].as_array().unwrap() {
        let mut model = golden["model"].clone();
        let pre = run["score_function"] == "softmax-pre";
        model["scoring_func"] = if pre { "softmax" } else { "softmax-post" }.into();
        model["norm_topk_prob"] = Value::Bool(!pre);
        equals_pytorch(model, &golden["train"], run, run["score_function"].as_str().unwrap());
    }
}

/// Dense layers, shared experts, norms of heads, biases, GeGLU, a window, tied embeddings; load balancing over a step and over all layers.
#[test]
fn every_kind_of_layer_equals_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_features.json")).unwrap();
    for run in golden["runs"].as_array().unwrap() {
        equals_pytorch(run["model"].clone(), &golden["train"], run, run["name"].as_str().unwrap());
    }
}

/// Multi-head latent attention as transformers has it.
#[test]
fn latent_attention_equals_transformers() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_latent.json")).unwrap();
    for run in golden["runs"].as_array().unwrap() {
        equals_pytorch(run["model"].clone(), &golden["train"], run, run["name"].as_str().unwrap());
    }
}

/// Norms over all heads and YaRN as transformers has them, and a token whose lookups give no gradient.
#[test]
fn what_published_models_add_equals_transformers() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_published.json")).unwrap();
    for run in golden["runs"].as_array().unwrap() {
        equals_pytorch(run["model"].clone(), &golden["train"], run, run["name"].as_str().unwrap());
    }
}

/// Biases of dense layers, of a shared expert, of experts.
#[test]
fn biases_equal_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_biases.json")).unwrap();
    for run in golden["runs"].as_array().unwrap() {
        equals_pytorch(run["model"].clone(), &golden["train"], run, run["name"].as_str().unwrap());
    }
}

fn equals_pytorch(model: Value, train: &Value, run: &Value, what: &str) {
    let number = |key: &str| train[key].as_f64().unwrap();
    let model: ModelConfig = serde_json::from_value(model).unwrap();
    let mut setup = common::setup(model, Default::default());
    setup.seed = train["seed"].as_u64().unwrap();
    setup.global_batch_size = number("global_batch_size") as usize;
    setup.micro_batch_size = number("micro_batch_size") as usize;
    setup.sequence_length = number("sequence_length") as usize;
    setup.lr.max = number("lr");
    setup.lr.min = number("min_lr");
    setup.lr.warmup_steps = number("warmup_steps") as u64;
    let decay_steps = number("decay_steps") as u64;
    setup.lr.shape = LrShape::Decay { decay_steps, style: DecayStyle::Cosine };
    setup.clip_grad = number("clip_grad");
    let steps = run["steps"].as_array().unwrap();
    let source = Recorded(run["steps"].clone(), setup.micro_batch_size);
    let ours = common::train_on(setup.clone(), steps.len() as u64, source);
    let expected = expected(run);
    assert_equal(&ours, &expected, &setup, what);
    for (a, b) in ours.reports.iter().zip(&expected.reports) {
        let (a, b) = (a.global_aux_loss, b.global_aux_loss);
        assert!(b.is_nan() || (a - b).abs() <= 1e-10 * b, "{what}: global_aux_loss {a} and {b}");
    }
}

/// The sequences that PyTorch saw.
#[derive(Clone)]
struct Recorded(Value, usize);

impl moe_train::trainer::BatchSource for Recorded {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<moe_train::trainer::Sequence>> {
        let step = &self.0[step as usize - 1];
        Ok((u * self.1..(u + 1) * self.1)
            .map(|row| {
                moe_train::trainer::Sequence::new(
                    serde_json::from_value(step["tokens"][row].clone()).unwrap(),
                    serde_json::from_value(step["weights"][row].clone()).unwrap(),
                )
            })
            .collect())
    }
}

fn expected(run: &Value) -> Outcome {
    let reports = run["steps"].as_array().unwrap().iter().zip(1..).map(|(step, number)| {
        let get = |key: &str| step[key].as_f64().unwrap();
        moe_train::trainer::StepReport {
            step: number,
            loss: Some(get("loss")),
            total_loss: Some(get("total_loss")),
            grad_norm: get("grad_norm"),
            lr: get("lr"),
            aux_loss: get("aux_loss"),
            sequence_aux_loss: get("aux_loss"), // not recorded, not compared
            global_aux_loss: step["global_aux_loss"].as_f64().unwrap_or(f64::NAN), // compared where recorded
            z_loss: get("z_loss"),
            dropped_tokens: 0,
            reruns: 0,
            expert_load: serde_json::from_value(step["expert_load"].clone()).unwrap(),
            moe_layers: Vec::new(), // not recorded, not compared
            updated: true,
        }
    });
    let state = run["final"].as_object().unwrap().iter().map(|(name, tensor)| {
        let values = ["param", "m", "v"].map(|key| serde_json::from_value(tensor[key].clone()).unwrap());
        (name.clone(), values)
    });
    Outcome { reports: reports.collect(), state: state.collect() }
}
