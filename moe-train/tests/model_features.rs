//! Every kind of layer under every mapping: in f64, any folding gives what one rank gives.

mod common;

use common::{assert_equal, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_model::ModelConfig;
use moe_model::config::HiddenAct;
use moe_topology::Mapping;

/// `(tp, dp, pp, etp, ep)`; the world is tp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize);

/// Each axis alone and with others: EP across TP and beyond DP, ETP above, below and across TP, three-way axes, stages of
/// one layer.
const FOLDINGS: [(Sizes, DispatcherKind); 9] = [
    ((2, 1, 1, 1, 2), AllToAll),
    ((1, 4, 1, 2, 2), AllGather),
    ((3, 2, 1, 2, 1), AllToAll),
    ((6, 1, 1, 3, 2), AllToAll),
    ((2, 2, 1, 1, 4), AllGather),
    ((1, 1, 3, 1, 1), AllToAll),
    ((3, 2, 2, 3, 2), AllToAll),
    ((2, 2, 3, 4, 1), AllToAll),
    ((2, 4, 2, 1, 8), AllToAll),
];

fn check(model: ModelConfig, foldings: &[(Sizes, DispatcherKind)]) {
    let model = ModelConfig { norm_topk_prob: true, ..model };
    model.check().unwrap();
    let with = |mapping: Mapping, dispatcher| {
        let mut setup = setup(model.clone(), mapping);
        setup.global_batch_size = 8;
        setup.dispatcher = dispatcher;
        setup
    };
    let one = with(Mapping::default(), AllToAll);
    let reference = train(one.clone(), 2);
    for report in &reference.reports {
        assert_eq!(report.expert_load.len(), model.moe_layers().count());
        assert!(report.expert_load.iter().all(|load| (load.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    }
    for &((tp, dp, pp, etp, ep), dispatcher) in foldings {
        let mapping = Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() };
        let folded = train(with(mapping, dispatcher), 2);
        assert_equal(&folded, &reference, &one, &format!("{:?} {dispatcher}", (tp, dp, pp, etp, ep)));
    }
}

/// A dense layer between two with a gated shared expert, all GeGLU.
#[test]
fn a_dense_layer_and_gated_shared_experts() {
    let model = ModelConfig {
        intermediate_size: 18,
        moe_intermediate_size: Some(12),
        shared_expert_intermediate_size: Some(30),
        mlp_only_layers: vec![1],
        hidden_act: HiddenAct::GeluPytorchTanh,
        ..tiny_model()
    };
    check(model, &FOLDINGS);
}

/// As DeepSeek: dense layers first, then shared experts without gate.
#[test]
fn dense_layers_first_and_shared_experts_without_gate() {
    let model = ModelConfig {
        intermediate_size: 30,
        moe_intermediate_size: Some(12),
        n_shared_experts: Some(2),
        first_k_dense_replace: 1,
        ..tiny_model()
    };
    check(model, &FOLDINGS);
}

/// Pipeline stages without any expert.
#[test]
fn experts_in_every_second_layer() {
    let model = ModelConfig { decoder_sparse_step: 2, ..tiny_model() };
    check(model, &FOLDINGS[5..]);
}

/// Norms of heads, biases and a window. A key's bias without a norm moves all scores of a query alike but for the
/// rotation; with a norm it matters.
#[test]
fn norms_of_heads_biases_and_a_window() {
    let normed = ModelConfig { use_qk_norm: true, attention_bias: true, ..tiny_model() };
    check(ModelConfig { sliding_window: Some(5), ..normed.clone() }, &FOLDINGS);
    check(ModelConfig { attention_bias: true, ..tiny_model() }, &FOLDINGS[..4]);
    // Key and value heads on several ranks each.
    let shared = ModelConfig { num_attention_heads: 8, num_key_value_heads: 2, ..normed };
    check(shared, &[((4, 1, 1, 1, 2), AllToAll), ((4, 2, 2, 2, 4), AllToAll)]);
}

/// A window is not what all keys are, unless it holds them all.
#[test]
fn a_window_hides_what_is_before_it() {
    let loss = |sliding_window| {
        let model = ModelConfig { sliding_window, ..tiny_model() };
        train(setup(model, Mapping::default()), 1).reports[0].loss.unwrap()
    };
    assert_eq!(loss(Some(12)), loss(None));
    assert_ne!(loss(Some(11)), loss(None));
}

/// One matrix for embedding and head: on one stage, and on the first and the last of several.
#[test]
fn tied_embeddings() {
    let model = ModelConfig { tie_word_embeddings: true, ..tiny_model() };
    check(model, &FOLDINGS);
}

/// No experts at all: what an MoE may be made from.
#[test]
fn a_dense_model() {
    let model = ModelConfig { first_k_dense_replace: 3, ..tiny_model() };
    check(model, &[((3, 2, 1, 1, 1), AllToAll), ((2, 2, 3, 1, 1), AllToAll)]);
}
