//! What published models add to layers, under every mapping: in f64, any folding gives what one rank gives.

mod common;

use common::{check, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_model::ModelConfig;
use moe_model::config::{QkNormScope, RopeScaling, Yarn};
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

/// Divides into 4, 8 and 12 chunks.
fn long(setup: &mut Setup) {
    setup.sequence_length = 24;
    setup.global_batch_size = 8;
}

/// Sequences go beyond the original length.
fn yarn() -> Option<RopeScaling> {
    Some(RopeScaling::Yarn(Yarn {
        factor: 4.0,
        original_max_position_embeddings: 10,
        beta_fast: 3.0,
        beta_slow: 0.3,
        mscale: None,
        mscale_all_dim: Some(0.7),
        attention_factor: None,
        truncate: false,
    }))
}

#[test]
fn scaled_rotations() {
    let model = ModelConfig { rope_scaling: yarn(), ..tiny_model() };
    check_all(&model, &[((2, 3, 1, 1, 1, 1, 2), AllToAll), ((1, 2, 2, 1, 3, 1, 2), AllGather)], long);
    let latent = ModelConfig {
        num_key_value_heads: 12,
        head_dim: None,
        kv_lora_rank: Some(14),
        qk_nope_head_dim: Some(3),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        ..model.clone()
    };
    check_all(&latent, &[((3, 2, 1, 1, 1, 1, 2), AllToAll)], long);
    let loss = |rope_scaling| {
        let model = ModelConfig { rope_scaling, ..tiny_model() };
        train(setup(model, Mapping::default()), 1).reports[0].loss.unwrap()
    };
    assert_eq!(loss(Some(RopeScaling::Linear { factor: 1.0 })), loss(None));
    assert_ne!(loss(Some(RopeScaling::Linear { factor: 2.0 })), loss(None));
    assert_ne!(loss(Some(RopeScaling::Linear { factor: 4.0 })), loss(yarn()));
}

/// As OLMoE: norms over all heads. Ranks of TP share keys' heads in twos and threes, of Ulysses too.
#[test]
fn norms_over_projections() {
    let model = ModelConfig { use_qk_norm: true, qk_norm_scope: QkNormScope::Projection, ..tiny_model() };
    check_all(
        &model,
        &[
            ((2, 1, 1, 1, 1, 1, 2), AllToAll),
            ((3, 2, 1, 1, 1, 1, 2), AllToAll),
            ((6, 1, 1, 1, 1, 2, 1), AllGather),
            ((1, 2, 2, 1, 3, 1, 2), AllToAll),
            ((2, 2, 1, 1, 3, 1, 4), AllToAll),
            ((2, 3, 3, 2, 1, 1, 2), AllToAll),
        ],
        long,
    );
    let shared =
        ModelConfig { num_attention_heads: 12, num_key_value_heads: 2, attention_bias: true, ..model };
    check_all(
        &shared,
        &[
            ((4, 1, 1, 1, 1, 1, 2), AllToAll),
            ((6, 1, 1, 1, 1, 1, 2), AllToAll),
            ((4, 2, 1, 2, 1, 1, 4), AllGather),
            ((2, 2, 2, 1, 1, 1, 2), AllToAll),
        ],
        long,
    );
}

/// The last id of a block of the vocabulary, the first, and one in a block that is short.
#[test]
fn a_token_whose_lookups_give_no_gradient() {
    for (tie_word_embeddings, pad) in [(false, 18), (true, 19), (true, 36)] {
        let model = ModelConfig { pad_token_id: Some(pad), tie_word_embeddings, ..tiny_model() };
        let foldings = [
            ((2, 1, 1, 1, 1, 1, 2), AllToAll),
            ((3, 2, 1, 1, 1, 1, 2), AllToAll),
            ((1, 1, 1, 2, 3, 1, 2), AllGather),
        ];
        check_all(&model, &foldings[tie_word_embeddings as usize..], |_| ());
    }
}

/// Without clipping, the first moment after one step is the gradient times a number.
#[test]
fn only_lookups_of_that_token_are_left_out() {
    let rows = |tie_word_embeddings, pad_token_id| -> Vec<Vec<f64>> {
        let model = ModelConfig { pad_token_id, tie_word_embeddings, ..tiny_model() };
        let mut setup = setup(model, Mapping::default());
        setup.clip_grad = 0.0;
        let [_, moment, _] = &train(setup, 1).state["model.embed_tokens.weight"];
        moment.chunks(24).map(<[f64]>::to_vec).collect()
    };
    for tied in [false, true] {
        let (with, without) = (rows(tied, Some(18)), rows(tied, None));
        for (id, (with, without)) in with.iter().zip(&without).enumerate() {
            assert_eq!(with == without, id != 18, "row {id}, tied {tied}");
        }
        // What the head gives a tied row is left.
        assert_eq!(with[18].iter().all(|&x| x == 0.0), !tied);
    }
}
