//! Dropping: what is kept of a micro-batch never depends on the mapping, only on the units in which tokens compete.

mod common;

use common::{Outcome, assert_equal, assert_same_bits, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_dispatch::capacity::DropPolicy::{self, Position, Probs};
use moe_model::config::ScoringFunc;
use moe_model::{DropUnit, ExpertCapacity, ModelConfig};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::Setup;

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn mapping((tp, cp, ulysses, dp, pp, etp, ep): Sizes) -> Mapping {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    mapping.split(Attention::CP_INNER, ulysses)
}

fn capacity(factor: f64, policy: DropPolicy) -> ExpertCapacity {
    ExpertCapacity { factor, policy, unit: DropUnit::MICRO_BATCH }
}

/// Two sequences in a micro-batch, so that slots are no positions.
fn with(model: &ModelConfig, mapping: Mapping, capacity: Option<ExpertCapacity>) -> Setup {
    Setup { capacity, global_batch_size: 8, micro_batch_size: 2, ..setup(model.clone(), mapping) }
}

/// Dropped choices of all steps.
fn dropped(outcome: &Outcome) -> u64 {
    outcome.reports.iter().map(|report| report.dropped_tokens).sum()
}

/// Positions and rows of a rank are in another order than those of the micro-batch under CP, and a part under TP.
const FOLDINGS: [(Sizes, DispatcherKind); 8] = [
    ((2, 1, 1, 2, 1, 1, 4), AllToAll),
    ((1, 2, 1, 1, 1, 1, 2), AllGather),
    ((1, 2, 2, 2, 1, 2, 2), AllToAll),
    ((2, 2, 1, 1, 1, 1, 4), AllToAll),
    ((3, 2, 2, 1, 1, 3, 2), AllGather),
    ((2, 3, 1, 1, 1, 2, 1), AllToAll),
    ((1, 1, 1, 4, 1, 1, 4), AllToAll),
    ((2, 1, 1, 1, 3, 2, 1), AllGather),
];

#[test]
fn a_micro_batch_drops_the_same_under_any_folding() {
    let normalized = tiny_model();
    let sigmoid = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        norm_topk_prob: false,
        shared_expert_intermediate_size: Some(12),
        ..tiny_model()
    };
    for (model, capacity) in [(&normalized, capacity(1.0, Probs)), (&sigmoid, capacity(0.6, Position))] {
        common::check(model, FOLDINGS.map(|(sizes, kind)| (mapping(sizes), kind)), 2, |setup| {
            *setup = with(model, setup.folding.mapping().clone(), Some(capacity));
        });
        let one = train(with(model, Mapping::default(), Some(capacity)), 2);
        assert!(dropped(&one) > 100, "{} are dropped", dropped(&one));
    }
}

/// What a rank drops of its own tokens is what one rank drops that is told of the parts.
#[test]
fn ranks_that_decide_alone_equal_one_rank_given_the_parts() {
    let model = tiny_model();
    for ((sizes, kind), policy) in FOLDINGS.into_iter().zip([Probs, Position].into_iter().cycle()) {
        let (tp, cp, ..) = sizes;
        let capacity = ExpertCapacity { unit: DropUnit { tp, cp }, ..capacity(0.8, policy) };
        let folded = Setup { dispatcher: kind, ..with(&model, mapping(sizes), Some(capacity)) };
        assert_eq!(DropUnit::of_rank(&folded.folding), capacity.unit);
        let one = with(&model, Mapping::default(), Some(capacity));
        let (folded, emulated) = (train(folded, 2), train(one.clone(), 2));
        let what = format!("{}, {kind}, {policy}", mapping(sizes));
        assert_equal(&folded, &emulated, &one, &what);
        assert!(dropped(&emulated) > 100, "{what}");
        if tp * cp > 1 {
            let full = train(with(&model, Mapping::default(), Some(self::capacity(0.8, policy))), 2);
            assert_ne!(dropped(&full), dropped(&emulated), "{what}: the parts make a difference");
        }
    }
}

/// The parts of one folding under another one, of which no rank holds a part.
#[test]
fn parts_are_kept_under_another_folding() {
    let model = tiny_model();
    let capacity = ExpertCapacity { unit: DropUnit { tp: 2, cp: 3 }, ..capacity(0.8, Probs) };
    let one = with(&model, Mapping::default(), Some(capacity));
    let emulated = train(one.clone(), 2);
    for sizes in [(3, 2, 1, 1, 1, 1, 2), (2, 1, 1, 2, 1, 1, 4), (1, 3, 3, 1, 1, 1, 1)] {
        let folded = train(with(&model, mapping(sizes), Some(capacity)), 2);
        assert_equal(&folded, &emulated, &one, &mapping(sizes).to_string());
    }
}

#[test]
fn a_capacity_that_is_never_reached_changes_no_bit() {
    let model = tiny_model();
    // E/K: room for all tokens at one expert, and more than that.
    for factor in [4.0, 1e9] {
        for sizes in [(1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1, 4)] {
            let run = |capacity| train(with(&model, mapping(sizes), capacity), 2);
            let limited = run(Some(capacity(factor, Position)));
            assert_same_bits(&limited, &run(None), &format!("factor {factor}"));
            assert_eq!(dropped(&limited), 0);
        }
    }
}

/// A capacity of one: 4 micro-batches of 24 tokens, 3 layers, each expert with tokens keeps one.
#[test]
fn a_tiny_factor_leaves_one_choice_to_each_expert() {
    let model = tiny_model();
    let one = train(with(&model, Mapping::default(), Some(capacity(1e-6, Probs))), 1);
    let choices = 4 * 24 * 2 * 3;
    let kept = choices - dropped(&one);
    assert!((4 * 3 * 2..=4 * 3 * 8).contains(&kept), "{kept} of {choices} are kept");
}

#[test]
fn evaluation_drops_nothing() {
    use moe_comm::ThreadWorld;
    use moe_kernels::Cpu;
    use moe_train::trainer::{BatchSource, RankTrainer};

    let model = tiny_model();
    let source = common::RandomBatches { vocab: 37, seq_len: 12, micro_batch: 2 };
    let loss = |capacity| {
        let (setup, source) = (with(&model, mapping((2, 1, 1, 1, 1, 1, 2)), capacity), source.clone());
        let losses = ThreadWorld::run(2, common::DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            trainer.evaluate(2, |u| source.micro_batch(9, u))
        });
        losses.unwrap()[0].unwrap().to_bits()
    };
    assert_eq!(loss(Some(capacity(0.5, Probs))), loss(None));
}
