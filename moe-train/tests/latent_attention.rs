//! Multi-head latent attention under every mapping: in f64, any folding gives what one rank gives.

mod common;

use common::{check, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::Setup;

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn mapping((tp, cp, ulysses, dp, pp, etp, ep): Sizes) -> Mapping {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    mapping.split(Attention::CP_INNER, ulysses)
}

fn check_all(model: &ModelConfig, foldings: &[(Sizes, DispatcherKind)], tweak: impl Fn(&mut Setup)) {
    model.check().unwrap();
    let foldings = foldings.iter().map(|&(sizes, dispatcher)| (mapping(sizes), dispatcher));
    check(model, foldings, 2, tweak);
}

/// As DeepSeek-V3, no two sizes alike.
fn latent_model() -> ModelConfig {
    ModelConfig {
        num_key_value_heads: 12,
        head_dim: None,
        q_lora_rank: Some(10),
        kv_lora_rank: Some(14),
        qk_nope_head_dim: Some(3),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        first_k_dense_replace: 1,
        n_shared_experts: Some(1),
        ..tiny_model()
    }
}

/// Divides into 4, 8 and 12 chunks.
fn long(setup: &mut Setup) {
    setup.sequence_length = 24;
    setup.global_batch_size = 8;
}

#[test]
fn tensor_pipeline_and_expert_parallelism() {
    let foldings = [
        ((2, 1, 1, 1, 1, 1, 2), AllToAll),
        ((3, 1, 1, 2, 1, 3, 2), AllToAll),
        ((6, 1, 1, 1, 1, 2, 1), AllGather),
        ((4, 1, 1, 2, 1, 1, 8), AllToAll),
        ((1, 1, 1, 2, 3, 2, 1), AllToAll),
        ((2, 1, 1, 2, 3, 1, 4), AllToAll),
    ];
    check_all(&latent_model(), &foldings, |_| ());
    let biased = ModelConfig { attention_bias: true, ..latent_model() };
    check_all(&biased, &foldings[1..3], |_| ());
}

#[test]
fn queries_without_a_latent() {
    let direct = ModelConfig { q_lora_rank: None, attention_bias: true, ..latent_model() };
    check_all(
        &direct,
        &[
            ((3, 1, 1, 1, 2, 1, 1), AllToAll),
            ((2, 2, 1, 1, 1, 1, 4), AllGather),
            ((2, 3, 3, 1, 1, 2, 1), AllToAll),
        ],
        long,
    );
}

#[test]
fn context_parallelism() {
    check_all(
        &latent_model(),
        &[
            ((1, 2, 1, 1, 1, 1, 1), AllToAll),
            ((1, 3, 1, 1, 1, 3, 1), AllToAll),
            ((2, 2, 1, 1, 2, 1, 4), AllToAll),
            ((1, 2, 2, 2, 1, 1, 4), AllGather),
            ((2, 3, 3, 1, 1, 1, 2), AllToAll),
            ((1, 6, 6, 1, 1, 1, 2), AllToAll),
            ((1, 4, 2, 1, 1, 2, 2), AllToAll),
            ((1, 6, 3, 2, 1, 3, 4), AllToAll),
        ],
        long,
    );
}

#[test]
fn interleaved_stages_tied_embeddings_and_batched_sequences() {
    let model = ModelConfig { num_hidden_layers: 4, tie_word_embeddings: true, ..latent_model() };
    check_all(&model, &[((2, 1, 1, 1, 2, 1, 2), AllToAll), ((1, 2, 1, 1, 2, 2, 1), AllToAll)], |setup| {
        setup.pipeline = PipelineLayout::even(4, setup.pipeline.ranks(), setup.pipeline.ranks()).unwrap();
        setup.micro_batch_size = 2;
    });
}

/// Half-split pairs, and a window, which a ring refuses.
#[test]
fn other_rotations_and_a_window() {
    let model = ModelConfig { rope_interleave: Some(false), sliding_window: Some(5), ..latent_model() };
    check_all(&model, &[((3, 1, 1, 1, 1, 1, 1), AllToAll), ((1, 2, 2, 1, 1, 1, 2), AllToAll)], long);
    let grouped = ModelConfig { rope_interleave: Some(true), ..tiny_model() };
    check_all(&grouped, &[((2, 2, 1, 1, 1, 1, 2), AllToAll)], long);
    let loss = |model: &ModelConfig, rope_interleave| {
        let model = ModelConfig { rope_interleave, ..model.clone() };
        train(setup(model, Mapping::default()), 1).reports[0].loss
    };
    assert_eq!(loss(&latent_model(), None), loss(&latent_model(), Some(true)));
    assert_ne!(loss(&latent_model(), None), loss(&latent_model(), Some(false)));
    assert_eq!(loss(&tiny_model(), None), loss(&tiny_model(), Some(false)));
}
