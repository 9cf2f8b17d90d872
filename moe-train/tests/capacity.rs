//! Dropping: what is kept of a micro-batch never depends on the mapping, only on the units in which tokens compete.

mod common;

use common::{Outcome, assert_equal, assert_same_bits, assert_same_metrics, setup, tiny_model, train};
use moe_comm::ThreadWorld;
use moe_comm::count::{Counted, Counters};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_dispatch::capacity::DropPolicy::{self, Position, Probs};
use moe_kernels::Cpu;
use moe_model::config::ScoringFunc;
use moe_model::{DropUnit, ExpertCapacity, ModelConfig, PipelineLayout};
use moe_topology::{Attention, Expert, GroupKey, Mapping};
use moe_train::trainer::{BatchSource, MoeLayerReport, RankTrainer, Setup};

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn mapping((tp, cp, ulysses, dp, pp, etp, ep): Sizes) -> Mapping {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    mapping.split(Attention::CP_INNER, ulysses)
}

fn capacity(factor: f64, policy: DropPolicy) -> ExpertCapacity {
    ExpertCapacity { factor, policy, unit: DropUnit::MICRO_BATCH, pad: false }
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

/// What is measured of a whole step is the mean over its layers with experts, or the sum, and of each layer the same under any
/// folding.
#[test]
fn measurements_of_layers_make_those_of_the_step() {
    let model = ModelConfig { num_hidden_layers: 4, mlp_only_layers: vec![1], ..tiny_model() };
    let run = |sizes, kind| {
        let setup = with(&model, mapping(sizes), Some(capacity(0.8, Probs)));
        train(Setup { dispatcher: kind, ..setup }, 2)
    };
    let one = run((1, 1, 1, 1, 1, 1, 1), AllToAll);
    for sizes in [(2, 1, 1, 2, 2, 2, 1), (1, 2, 1, 1, 2, 1, 2)] {
        assert_same_metrics(&run(sizes, AllGather), &one, &format!("{}", mapping(sizes)));
    }
    for report in &one.reports {
        let layers = &report.moe_layers;
        assert!(layers.iter().map(|layer| layer.layer).eq([0, 2, 3]));
        let mean = |value: fn(&MoeLayerReport) -> f64| layers.iter().map(value).sum::<f64>() / 3.0;
        for (mean, whole) in [
            (mean(|layer| layer.aux_loss), report.aux_loss),
            (mean(|layer| layer.sequence_aux_loss), report.sequence_aux_loss),
            (mean(|layer| layer.global_aux_loss), report.global_aux_loss),
            (mean(|layer| layer.z_loss), report.z_loss),
        ] {
            assert!((mean - whole).abs() <= 1e-14 * whole, "{mean} and {whole}");
        }
        let dropped = layers.iter().map(|layer| layer.dropped_tokens);
        assert_eq!(dropped.sum::<u64>(), report.dropped_tokens);
        for (layer, load) in layers.iter().zip(&report.expert_load) {
            let largest = load.iter().fold(0.0, |max: f64, &load| max.max(load));
            assert!(largest > 1.0 / 8.0 && layer.max_expert_load == largest * 8.0, "{layer:?} of {load:?}");
            assert!(layer.dropped_tokens > 0, "{layer:?}");
        }
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

/// Fixed shapes: the forward pass has the same bits, gradients those of sums with zeros among their terms.
#[test]
fn rows_without_a_choice_change_nothing() {
    let model = ModelConfig { expert_mlp_bias: true, ..tiny_model() };
    for ((sizes, kind), policy) in FOLDINGS.into_iter().zip([Probs, Position].into_iter().cycle()) {
        let (tp, cp, ..) = sizes;
        // A rank's own, a micro-batch, and parts that no rank holds.
        for unit in [DropUnit { tp, cp }, DropUnit::MICRO_BATCH, DropUnit { tp: 4, cp: 1 }] {
            let run = |pad| {
                let capacity = ExpertCapacity { unit, pad, ..capacity(0.8, policy) };
                train(Setup { dispatcher: kind, ..with(&model, mapping(sizes), Some(capacity)) }, 1)
            };
            let (padded, exact) = (run(true), run(false));
            let what = format!("{}, {kind}, {policy}, {unit:?}", mapping(sizes));
            let [(a, b)] = padded.reports.iter().zip(&exact.reports).collect::<Vec<_>>()[..] else {
                panic!()
            };
            assert_eq!(a.loss.map(f64::to_bits), b.loss.map(f64::to_bits), "{what}");
            assert_eq!(a.dropped_tokens, b.dropped_tokens, "{what}");
            for (name, [_, m, _]) in &exact.state {
                let largest = m.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                for (x, y) in padded.state[name][1].iter().zip(m) {
                    let close = (x - y).abs() <= 1e-12 * largest + 1e-16 * b.grad_norm;
                    assert!(close, "{what}: the gradient of {name}: {x} and {y}");
                }
            }
        }
    }
}

/// Rank by rank, all-gathers and bytes of all-to-alls among the pairs of ranks that share experts, in one step.
fn exchanged(capacity: Option<ExpertCapacity>) -> Vec<(u64, u64)> {
    let setup = with(&tiny_model(), mapping((1, 1, 1, 4, 1, 1, 2)), capacity);
    let source = common::RandomBatches { vocab: 37, seq_len: 12, micro_batch: 2 };
    let ranks = ThreadWorld::run(4, common::DEADLINE, move |world| {
        let counters = Counters::default();
        let world = Counted::new(world, counters.clone());
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        trainer.step(1, &source)?;
        let counts = counters.snapshot();
        let count = |group: GroupKey, op| counts.get(&(group, op)).copied().unwrap_or_default();
        let exchanges = count((Expert::ETP | Expert::EP).into(), "all_gather").calls;
        Ok::<_, moe_train::Error>((exchanges, count(Expert::EP.into(), "all_to_all").bytes))
    });
    ranks.unwrap()
}

#[test]
fn fixed_shapes_exchange_no_counts_and_equally_many_rows() {
    let exact = exchanged(Some(capacity(0.8, Probs)));
    assert!(exact.iter().all(|&(gathers, _)| gathers == 3), "a layer exchanges counts: {exact:?}");
    let padded = exchanged(Some(ExpertCapacity { pad: true, ..capacity(0.8, Probs) }));
    // 3 layers send ⌈0.8 · 24 · 2/8⌉ = 5 rows of 24 to each of 8 experts, four times, and twice a weight beside each.
    let bytes = 3 * 5 * 8 * (4 * 24 + 2) * 8;
    assert_eq!(padded, [(0, bytes); 4], "beside {exact:?}");
}

/// Steps of which some overflow a budget and some do not.
fn with_budget(setup: &Setup, factor: f64, steps: u64) -> (Outcome, Vec<u64>) {
    let mut outcome = train(Setup { expert_rank_capacity: Some(factor), ..setup.clone() }, steps);
    let reruns = outcome.reports.iter_mut().map(|report| std::mem::take(&mut report.reruns)).collect();
    (outcome, reruns)
}

/// As if the first try had not been: balance losses of three scopes (one with a counting pass), biases that move by counts,
/// several micro-batches and stages, dropping, gradients reduced while backward goes on.
#[test]
fn a_step_beyond_the_budget_of_a_rank_is_made_again_without() {
    use moe_model::config::{AuxLoss, AuxLossScope};
    let losses =
        [(AuxLossScope::MicroBatch, 0.02), (AuxLossScope::Sequence, 0.01), (AuxLossScope::Global, 0.03)];
    let model = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        router_aux_loss_coef: None,
        router_aux_losses: losses.map(|(scope, coef)| AuxLoss { scope, coef }).to_vec(),
        ..tiny_model()
    };
    let mut seen = [0; 2];
    for (sizes, kind) in [
        ((1, 1, 1, 2, 1, 1, 2), AllToAll),
        ((2, 1, 1, 1, 1, 1, 2), AllGather),
        ((1, 2, 1, 1, 3, 1, 2), AllToAll),
        ((2, 2, 1, 1, 1, 2, 2), AllToAll),
        ((2, 1, 1, 2, 1, 1, 4), AllGather),
        ((1, 1, 1, 4, 1, 2, 2), AllToAll),
    ] {
        for capacity in [None, Some(capacity(1.5, Probs))] {
            let setup = Setup { dispatcher: kind, ..with(&model, mapping(sizes), capacity) };
            let what = format!("{}, {kind}, {capacity:?}", mapping(sizes));
            let free = train(setup.clone(), 3);
            for factor in [1.0, 1.2, 1.3, 64.0] {
                let (limited, reruns) = with_budget(&setup, factor, 3);
                assert_same_bits(&limited, &free, &format!("{what}, factor {factor}"));
                assert!(reruns.iter().all(|&reruns| reruns <= 1), "{what}: {reruns:?}");
                let total: u64 = reruns.iter().sum();
                assert!(factor < 64.0 || total == 0, "{what}: a budget for all is never exceeded");
                assert!(factor > 1.0 || total == 3, "{what}: no load is that even");
                (seen[0], seen[1]) = (seen[0] + total, seen[1] + 3 - total);
            }
        }
    }
    assert!(seen.iter().all(|&steps| steps > 40), "{seen:?} steps were made again and were not");
}

/// Interleaved stages, and a rank that holds all experts, for which no load is uneven.
#[test]
fn budgets_and_virtual_stages() {
    let mut setup = with(&tiny_model(), mapping((1, 1, 1, 2, 1, 1, 1)), None);
    assert_eq!(with_budget(&setup, 1.0, 2).1, [0, 0]);
    setup = with(&ModelConfig { num_hidden_layers: 4, ..tiny_model() }, mapping((1, 1, 1, 2, 2, 1, 2)), None);
    setup.pipeline = PipelineLayout::even(4, 2, 2).unwrap();
    let free = train(setup.clone(), 2);
    let (limited, reruns) = with_budget(&setup, 1.0, 2);
    assert_same_bits(&limited, &free, "VPP2");
    assert_eq!(reruns, [1, 1]);
}

#[test]
fn evaluation_drops_nothing() {
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
