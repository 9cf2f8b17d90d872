//! Sequences cut over ranks: in f64, ring, all-to-all and both give what one rank with dense attention gives.

mod common;

use common::{DEADLINE, RandomBatches, check, setup, tiny_model};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{BatchSource, RankTrainer, Setup};
use proptest::prelude::*;

const STEPS: u64 = 2;

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn mapping((tp, cp, ulysses, dp, pp, etp, ep): Sizes, order: &str) -> Mapping {
    let order = order.parse().unwrap();
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, order, ..Mapping::default() };
    mapping.split(Attention::CP_INNER, ulysses)
}

fn check_all(model: &ModelConfig, foldings: &[(Sizes, &str, DispatcherKind)], tweak: impl Fn(&mut Setup)) {
    let foldings = foldings.iter().map(|&(sizes, order, dispatcher)| (mapping(sizes, order), dispatcher));
    check(model, foldings, STEPS, tweak);
}

/// Divides into 4, 6, 8 and 12 chunks, some of them of odd length.
fn long(setup: &mut Setup) {
    setup.sequence_length = 24;
    setup.global_batch_size = 8;
}

const PP_LAST: &str = "tp-cp-ep-dp-pp";
const DP_LAST: &str = "tp-cp-ep-pp-dp";

#[test]
fn ring() {
    check_all(
        &tiny_model(),
        &[
            ((1, 2, 1, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 3, 1, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 4, 1, 1, 1, 1, 1), PP_LAST, AllToAll),
            // Experts folded over CP: EP > DP, ETP > TP.
            ((1, 4, 1, 1, 1, 1, 4), PP_LAST, AllToAll),
            ((1, 4, 1, 1, 1, 2, 2), PP_LAST, AllGather),
            ((1, 3, 1, 1, 1, 3, 1), PP_LAST, AllToAll),
            ((2, 2, 1, 1, 1, 1, 4), PP_LAST, AllToAll),
            ((3, 2, 1, 1, 1, 3, 2), PP_LAST, AllToAll),
            ((2, 2, 1, 2, 1, 1, 8), PP_LAST, AllToAll),
            ((2, 3, 1, 1, 2, 3, 2), PP_LAST, AllToAll),
            ((1, 4, 1, 2, 2, 1, 8), PP_LAST, AllToAll),
            // CP nearer than TP, and stages within data parallelism.
            ((2, 2, 1, 2, 1, 2, 2), "cp-tp-dp-ep-pp", AllToAll),
            ((2, 2, 1, 2, 2, 1, 4), DP_LAST, AllToAll),
        ],
        long,
    );
}

#[test]
fn ulysses() {
    check_all(
        &tiny_model(),
        &[
            ((1, 2, 2, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 3, 3, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 6, 6, 1, 1, 1, 2), PP_LAST, AllToAll),
            ((2, 3, 3, 1, 1, 1, 2), PP_LAST, AllToAll),
            ((3, 2, 2, 1, 1, 6, 1), PP_LAST, AllGather),
            ((1, 2, 2, 2, 2, 1, 4), PP_LAST, AllToAll),
            ((2, 3, 3, 1, 2, 3, 2), DP_LAST, AllToAll),
        ],
        long,
    );
}

#[test]
fn ring_of_ulysses() {
    check_all(
        &tiny_model(),
        &[
            ((1, 4, 2, 1, 1, 1, 1), PP_LAST, AllToAll),
            ((1, 6, 2, 1, 1, 3, 2), PP_LAST, AllToAll),
            ((1, 6, 3, 1, 1, 1, 2), PP_LAST, AllGather),
            ((1, 4, 2, 2, 1, 1, 8), PP_LAST, AllToAll),
            ((3, 4, 2, 1, 1, 3, 4), PP_LAST, AllToAll),
            ((1, 4, 2, 2, 2, 2, 4), PP_LAST, AllToAll),
            ((1, 4, 2, 1, 2, 2, 2), "cp-tp-ep-pp-dp", AllToAll),
        ],
        long,
    );
}

/// Eight heads over two key-value heads, several sequences in a micro-batch: with more ranks than key-value heads,
/// neighbours get the same one.
#[test]
fn shared_kv_heads_and_batched_sequences() {
    let model = ModelConfig { num_attention_heads: 8, num_key_value_heads: 2, ..tiny_model() };
    check_all(
        &model,
        &[
            ((1, 4, 4, 1, 1, 1, 4), PP_LAST, AllToAll),
            ((2, 4, 2, 1, 1, 1, 8), PP_LAST, AllToAll),
            ((2, 4, 4, 1, 1, 4, 2), PP_LAST, AllToAll),
            ((4, 2, 2, 1, 1, 2, 4), PP_LAST, AllGather),
            ((4, 2, 1, 1, 1, 1, 8), PP_LAST, AllToAll),
        ],
        |setup| {
            setup.global_batch_size = 4;
            setup.micro_batch_size = 2;
            setup.sequence_length = 16;
        },
    );
}

/// All-to-all sees whole sequences, so a window is one; norms of heads and biases go along, with dense layers and a
/// shared expert beside it.
#[test]
fn sliding_window_and_other_features_of_the_model() {
    let model = ModelConfig {
        sliding_window: Some(7),
        use_qk_norm: true,
        attention_bias: true,
        first_k_dense_replace: 1,
        moe_intermediate_size: Some(12),
        shared_expert_intermediate_size: Some(18),
        ..tiny_model()
    };
    let foldings = [(1, 3, 3, 1, 1, 1, 1), (2, 3, 3, 1, 1, 3, 2)].map(|sizes| (sizes, PP_LAST, AllToAll));
    check_all(&model, &foldings, long);
    let model = ModelConfig { sliding_window: None, tie_word_embeddings: true, ..model };
    let foldings = [(1, 4, 1, 1, 2, 1, 4), (3, 4, 2, 1, 1, 3, 4)].map(|sizes| (sizes, PP_LAST, AllToAll));
    check_all(&model, &foldings, long);
}

#[test]
fn interleaved_stages() {
    let model = ModelConfig { num_hidden_layers: 4, ..tiny_model() };
    let foldings = [(1, 2, 1, 1, 2, 1, 2), (1, 4, 2, 1, 2, 2, 2)].map(|sizes| (sizes, PP_LAST, AllToAll));
    check_all(&model, &foldings, |setup| {
        long(setup);
        let stages = setup.folding.size(Attention::PP);
        setup.pipeline = PipelineLayout::even(4, stages, stages).unwrap();
    });
}

#[test]
fn evaluation() {
    let loss = |mapping: Mapping| {
        let mut setup = setup(tiny_model(), mapping);
        long(&mut setup);
        let losses = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 24, micro_batch: 1 };
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            trainer.evaluate(6, |u| source.micro_batch(9, u))
        })
        .unwrap();
        assert!(losses.iter().all(|loss| *loss == losses[0]));
        losses[0].unwrap()
    };
    let one = loss(Mapping::default());
    for sizes in [(1, 3, 1, 1, 1, 1, 1), (2, 2, 1, 1, 2, 1, 4), (1, 4, 2, 2, 1, 1, 8)] {
        let folded = loss(mapping(sizes, PP_LAST));
        assert!((folded - one).abs() <= 1e-12 * one, "{sizes:?}: {folded} and {one}");
    }
}

#[test]
fn a_sequence_that_is_not_two_chunks_for_each_rank_is_refused() {
    let mut setup = setup(tiny_model(), mapping((1, 2, 1, 1, 1, 1, 1), PP_LAST));
    setup.sequence_length = 14;
    let error = ThreadWorld::run(2, DEADLINE, move |world| {
        let source = RandomBatches { vocab: 37, seq_len: 14, micro_batch: 1 };
        RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::new(1))?.step(1, &source)
    })
    .unwrap_err();
    assert!(error.to_string().contains("14 tokens is not 4 (2·cp) equal chunks: 14 % 4 = 2"), "{error}");
}

fn sizes() -> impl Strategy<Value = Sizes> {
    let axes = (
        prop::sample::select(vec![1usize, 2, 3]),
        prop::sample::select(vec![2usize, 3, 4, 6]),
        prop::sample::select(vec![1usize, 2, 3, 6]),
        1usize..=2,
        1usize..=2,
        prop::sample::select(vec![1usize, 2, 3, 4]),
        prop::sample::select(vec![1usize, 2, 4, 8]),
    );
    axes.prop_filter("legal, at most 16 ranks", |&(tp, cp, ulysses, dp, pp, etp, ep)| {
        tp * cp * dp * pp <= 16
            && cp % ulysses == 0
            && 6 / tp % ulysses == 0 // key-value heads
            && (24 / cp) % tp == 0
            && (tp * cp * dp) % (etp * ep) == 0
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn any_folding(sizes in sizes(), all_gather in any::<bool>()) {
        let dispatcher = if all_gather { AllGather } else { AllToAll };
        check_all(&tiny_model(), &[(sizes, PP_LAST, dispatcher)], |setup| {
            long(setup);
            setup.global_batch_size = 4;
        });
    }
}
