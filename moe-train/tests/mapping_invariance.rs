//! The mapping never changes the mathematics: in f64, any folding gives what one rank gives.

mod common;

use common::tiny_model;
use moe_dispatch::DispatcherKind;
use moe_model::ModelConfig;
use moe_model::config::ScoringFunc;
use moe_topology::Mapping;
use proptest::prelude::*;

const STEPS: u64 = 3;

/// `(tp, dp, pp, etp, ep)`; the world is tp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize);

fn mapping((tp, dp, pp, etp, ep): Sizes, order: &str) -> Mapping {
    Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, order: order.parse().unwrap(), ..Mapping::default() }
}

fn check(
    model: &ModelConfig,
    foldings: &[(Sizes, &str, DispatcherKind)],
    tweak: impl Fn(&mut moe_train::trainer::Setup),
) {
    let foldings = foldings.iter().map(|&(sizes, order, dispatcher)| (mapping(sizes, order), dispatcher));
    common::check(model, foldings, STEPS, tweak);
}

const PP_LAST: &str = "tp-cp-ep-dp-pp";
const DP_LAST: &str = "tp-cp-ep-pp-dp";
use DispatcherKind::{AllGather, AllToAll};

/// KV heads 6, so TP of 1, 2, 3 and 6; experts 8, inner width 12.
#[test]
fn tensor_data_pipeline_and_expert_axes() {
    check(
        &tiny_model(),
        &[
            ((2, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((3, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 4, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 1, 3, 1, 1), PP_LAST, AllToAll),
            // Expert parallelism inside, across and beyond data parallelism.
            ((1, 2, 1, 1, 2), PP_LAST, AllToAll),
            ((2, 2, 1, 1, 4), PP_LAST, AllToAll),
            ((2, 2, 1, 1, 4), PP_LAST, AllGather),
            ((2, 1, 1, 1, 2), PP_LAST, AllToAll),
            ((2, 4, 1, 1, 8), PP_LAST, AllToAll),
            // ETP above and below TP, and alone.
            ((1, 4, 1, 4, 1), PP_LAST, AllToAll),
            ((1, 4, 1, 2, 2), PP_LAST, AllToAll),
            ((1, 4, 1, 2, 2), PP_LAST, AllGather),
            ((6, 1, 1, 3, 2), PP_LAST, AllToAll),
            ((2, 4, 1, 2, 2), PP_LAST, AllGather),
            // Three-way axes.
            ((3, 2, 1, 2, 1), PP_LAST, AllToAll),
            ((3, 4, 1, 3, 4), PP_LAST, AllToAll),
            ((6, 2, 1, 1, 4), PP_LAST, AllToAll),
            ((3, 2, 2, 3, 2), PP_LAST, AllToAll),
            // All five, in both orders.
            ((2, 2, 2, 1, 4), PP_LAST, AllToAll),
            ((2, 4, 2, 2, 4), PP_LAST, AllToAll),
            ((2, 2, 2, 1, 2), DP_LAST, AllToAll),
            ((2, 4, 2, 2, 1), DP_LAST, AllGather),
            ((1, 8, 2, 1, 8), PP_LAST, AllToAll),
            ((2, 2, 3, 4, 1), PP_LAST, AllToAll),
        ],
        |_| {},
    );
}

/// TP of 4 and 8 over 2 KV heads: neighbouring ranks share a head and sum its gradients. Several sequences in a
/// micro-batch, fewer micro-batches than stages.
#[test]
fn shared_kv_heads_and_batched_sequences() {
    let model = ModelConfig { num_attention_heads: 8, num_key_value_heads: 2, ..tiny_model() };
    check(
        &model,
        &[
            ((4, 1, 1, 1, 2), PP_LAST, AllToAll),
            ((8, 1, 1, 1, 8), PP_LAST, AllToAll),
            ((4, 2, 2, 2, 4), PP_LAST, AllToAll),
            ((2, 2, 3, 1, 4), PP_LAST, AllGather),
        ],
        |setup| {
            setup.global_batch_size = 4;
            setup.micro_batch_size = 2;
            setup.sequence_length = 16;
        },
    );
}

/// 24 tokens and 32 experts with one choice each: experts without tokens are certain.
#[test]
fn experts_without_tokens() {
    let model = ModelConfig {
        num_local_experts: 32,
        num_experts_per_tok: 1,
        scoring_func: ScoringFunc::Softmax,
        norm_topk_prob: false,
        ..tiny_model()
    };
    check(
        &model,
        &[
            ((1, 4, 1, 1, 4), PP_LAST, AllToAll),
            ((2, 2, 1, 2, 2), PP_LAST, AllToAll),
            ((2, 4, 1, 1, 8), PP_LAST, AllGather),
            ((2, 4, 2, 1, 8), PP_LAST, AllToAll),
        ],
        |setup| {
            setup.global_batch_size = 4;
            setup.sequence_length = 6;
        },
    );
}

fn sizes() -> impl Strategy<Value = (Sizes, bool, bool)> {
    let axes = (
        prop::sample::select(vec![1usize, 2, 3, 6]),
        prop::sample::select(vec![1usize, 2, 4, 8]),
        1usize..=3,
        prop::sample::select(vec![1usize, 2, 3, 4, 6]),
        prop::sample::select(vec![1usize, 2, 4, 8]),
    );
    (axes, any::<bool>(), any::<bool>()).prop_filter(
        "legal, at most 16 ranks",
        |&((tp, dp, pp, etp, ep), dp_last, _)| {
            let world = tp * dp * pp;
            world <= 16 && world > 1 && (tp * dp) % (etp * ep) == 0 && (!dp_last || pp == 1 || tp == etp * ep)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 240, ..ProptestConfig::default() })]

    #[test]
    fn any_folding(((sizes, dp_last, all_gather), normalize) in (sizes(), any::<bool>())) {
        let model = ModelConfig { scoring_func: ScoringFunc::Softmax, norm_topk_prob: normalize, ..tiny_model() };
        let dispatcher = if all_gather { AllGather } else { AllToAll };
        check(&model, &[(sizes, if dp_last { DP_LAST } else { PP_LAST }, dispatcher)], |setup| {
            setup.global_batch_size = 8;
        });
    }
}
