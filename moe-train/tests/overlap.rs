//! Reductions of gradients beside backward passes, gathers of weights beside forward passes: they do overlap, and change no
//! bit.

mod common;

use common::{DEADLINE, RandomBatches, assert_same_bits, setup, tiny_model, train_in};
use moe_comm::trace::{Event, Moment, Trace, Traced};
use moe_comm::{ThreadWorld, World};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::{Backend, Cpu, Float};
use moe_model::axes::CP_DP;
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Expert, GroupKey, Mapping};
use moe_train::trainer::{BatchSource, RankTrainer, Setup};

/// `(tp, cp, dp, pp, vpp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn case(model: ModelConfig, (tp, cp, dp, pp, vpp, etp, ep): Sizes, dispatcher: DispatcherKind) -> Setup {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    let pipeline = PipelineLayout::even(model.num_hidden_layers, pp, vpp).unwrap();
    Setup { pipeline, dispatcher, global_batch_size: 8, ..setup(model, mapping) }
}

/// The step with one switch on or both, against none of them.
fn same_bits<T: Float>(model: &ModelConfig, cases: &[(Sizes, DispatcherKind)])
where
    Cpu: Backend<T>,
{
    for &(sizes, dispatcher) in cases {
        let train = |overlap_grad_reduce, overlap_param_gather| {
            let setup = case(model.clone(), sizes, dispatcher);
            let source = source(&setup);
            train_in::<T>(Setup { overlap_grad_reduce, overlap_param_gather, ..setup }, 3, source)
        };
        let reference = train(false, false);
        for (reduce, gather) in [(true, false), (false, true), (true, true)] {
            let what = format!("{sizes:?} {dispatcher}: reductions {reduce}, gathers {gather}");
            assert_same_bits(&train(reduce, gather), &reference, &what);
        }
    }
}

fn source(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

/// Every reduction group, with one rank and several: TP·CP·DP, CP·DP, EDP, and that of key-value heads that ranks share.
const CASES: [(Sizes, DispatcherKind); 5] = [
    ((1, 1, 4, 1, 1, 1, 2), AllToAll),
    ((2, 2, 2, 1, 1, 1, 4), AllToAll),
    ((2, 1, 2, 2, 1, 2, 1), AllGather),
    ((1, 1, 2, 2, 2, 1, 1), AllToAll),
    ((4, 1, 2, 1, 1, 1, 4), AllToAll),
];

fn model() -> ModelConfig {
    // Two key-value heads, so that TP of 4 shares them; a stage for each of four layers.
    ModelConfig { num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 2, ..tiny_model() }
}

#[test]
fn overlap_changes_no_bit_in_f64() {
    same_bits::<f64>(&model(), &CASES);
}

#[test]
fn overlap_changes_no_bit_in_f32() {
    same_bits::<f32>(&model(), &CASES);
}

/// On one rank embedding and head share a bucket, which both have to complete; on two, its sums cross the pipeline.
#[test]
fn tied_embeddings_overlap_without_a_changed_bit() {
    let tied = ModelConfig { tie_word_embeddings: true, ..model() };
    same_bits::<f64>(&tied, &[CASES[0], CASES[3], ((2, 1, 2, 1, 1, 1, 2), AllToAll)]);
}

/// What rank 0 calls in the first step, and in the second.
fn traces(setup: Setup) -> [Vec<Event>; 2] {
    let source = source(&setup);
    let mut ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let trace = Trace::default();
        let world: Box<dyn World<Cpu>> = Box::new(Traced::new(world, trace.clone()));
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &*world, Cpu::poisoned(1))?;
        trace.take();
        let mut step = |step| trainer.step(step, &source as &dyn BatchSource).map(|_| trace.take());
        Ok::<_, moe_train::Error>([step(1)?, step(2)?])
    })
    .unwrap_or_else(|error| panic!("{error}"));
    ranks.swap_remove(0)
}

fn starts(events: &[Event], op: &str, group: impl Into<GroupKey>) -> Vec<usize> {
    let group = group.into();
    let found = |event: &Event| event.moment == Moment::Start && event.op == op && event.group == group;
    (0..events.len()).filter(|&at| found(&events[at])).collect()
}

/// Four layers on DP4 / EP2 EDP2, two micro-batches per rank: each layer's backward pass calls the all-to-all of its experts.
#[test]
fn reductions_start_while_earlier_layers_are_at_their_backward_pass() {
    let setup = |overlap_grad_reduce| Setup { overlap_grad_reduce, ..case(model(), CASES[0].0, AllToAll) };
    let [early, _] = traces(setup(true));
    let [late, _] = traces(setup(false));

    // Each layer's dispatch and combine, forward and backward, moves rows (and probabilities) the same number of times.
    let passes = starts(&early, "all_to_all", Expert::EP).len();
    assert_eq!(passes, starts(&late, "all_to_all", Expert::EP).len());
    let after = |events: &[Event]| -> Vec<usize> {
        let all_to_alls = starts(events, "all_to_all", Expert::EP);
        let reductions = starts(events, "reduce_scatter", Expert::EDP);
        assert_eq!(reductions.len(), 4, "one for the experts of each layer");
        reductions.iter().map(|start| all_to_alls.iter().filter(|&at| at > start).count()).collect()
    };
    // The last layer's experts are reduced while three layers are to come, and so on.
    let left = after(&early);
    assert!(left[3] == 0 && left[2] > 0 && left[1] == 2 * left[2] && left[0] == 3 * left[2], "{left:?}");
    assert_eq!(after(&late), [0; 4]);

    // The same operations.
    let sorted = |events: &[Event]| {
        let mut ops: Vec<_> = events.iter().map(|event| (event.op, event.group)).collect();
        ops.sort();
        ops
    };
    assert_eq!(sorted(&early), sorted(&late));
}

/// With two stages of two layers on each of two ranks: the later stage's gradients are reduced while the earlier one has
/// micro-batches to go.
#[test]
fn reductions_of_one_virtual_stage_start_before_the_backward_pass_of_another_ends() {
    let eight = ModelConfig { num_hidden_layers: 8, ..model() };
    let [events, _] = traces(case(eight, (1, 1, 2, 2, 2, 1, 2), AllToAll));
    // With one rank of EDP, the dense gradients.
    let reductions = starts(&events, "reduce_scatter", CP_DP);
    let all_to_alls = starts(&events, "all_to_all", Expert::EP);
    let left: Vec<usize> =
        reductions.iter().map(|start| all_to_alls.iter().filter(|&at| at > start).count()).collect();
    let per_layer = left.iter().rev().find(|&&n| n > 0).unwrap();
    assert!(left[0] >= 3 * per_layer, "{left:?}");
}

#[test]
fn weights_are_gathered_until_their_layer_needs_them() {
    let setup = |overlap_param_gather| Setup { overlap_param_gather, ..case(model(), CASES[0].0, AllToAll) };
    let [first, second] = traces(setup(true));
    let gathers: Vec<u64> =
        starts(&first, "all_gather", Expert::EDP).iter().map(|&at| first[at].number).collect();
    assert_eq!(gathers.len(), 4, "one for the experts of each layer");
    let waits = |events: &[Event]| -> Vec<usize> {
        let of = |number| events.iter().position(|e| e.moment == Moment::Wait && e.number == number);
        gathers.iter().filter_map(|&number| of(number)).collect()
    };
    assert!(waits(&first).is_empty(), "the step does not wait");
    let waits_in_second = waits(&second);
    let all_to_alls = starts(&second, "all_to_all", Expert::EP);
    let before: Vec<usize> =
        waits_in_second.iter().map(|wait| all_to_alls.iter().filter(|&at| at < wait).count()).collect();
    assert!(before[0] == 0 && before[1] > 0, "{before:?}");
    assert!(before[2] == 2 * before[1] && before[3] == 3 * before[1], "{before:?}");

    let [first, _] = traces(setup(false));
    assert_eq!(waits(&first).len(), 4, "the step waits");
}

/// Between start and wait of the all-to-all that brings rows to the experts, and of the one that brings gradients, the shared
/// expert gathers its own rows over TP; without the switch nothing does.
#[test]
fn shared_experts_compute_while_rows_are_on_their_way() {
    let gathers_beside = |moe_shared_expert_overlap| {
        let model = ModelConfig { shared_expert_intermediate_size: Some(12), ..model() };
        let setup = case(model, (2, 1, 2, 1, 1, 1, 4), AllToAll);
        let [events, _] = traces(Setup { moe_shared_expert_overlap, ..setup });
        let wait_of = |start: &Event| {
            let waited = |e: &Event| e.moment == Moment::Wait && e.number == start.number;
            events.iter().position(waited).expect("what a step starts for its rows it awaits")
        };
        let moves_rows = |e: &Event| e.moment == Moment::Start && e.op == "all_to_all";
        let started = (0..events.len()).filter(|&at| moves_rows(&events[at]));
        let flights: Vec<_> = started.map(|at| at..wait_of(&events[at])).collect();
        let gathers = starts(&events, "all_gather", Attention::TP);
        gathers.iter().filter(|at| flights.iter().any(|flight| flight.contains(at))).count()
    };
    assert_eq!(gathers_beside(false), 0);
    // In 4 layers and micro-batches: rows in forward; rows once more and the gradient in backward.
    assert_eq!(gathers_beside(true), 4 * 4 * 3);
}

/// An evaluation after a step sees its weights, whether they had arrived or not.
#[test]
fn an_evaluation_waits_for_the_weights() {
    let losses = |overlap_param_gather| {
        let setup = Setup { overlap_param_gather, ..case(model(), CASES[3].0, AllToAll) };
        let source = source(&setup);
        let losses = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            let mut losses = vec![trainer.evaluate(4, |u| source.micro_batch(9, u))?];
            for step in 1..=2 {
                trainer.step(step, &source)?;
                losses.push(trainer.evaluate(4, |u| source.micro_batch(9, u))?);
            }
            assert!(trainer.cx().params.weights(0).is_ok(), "they were needed");
            trainer.step(3, &source)?;
            assert_eq!(trainer.cx().params.weights(0).is_err(), overlap_param_gather);
            trainer.await_weights()?;
            assert!(trainer.cx().params.weights(0).is_ok());
            Ok::<_, moe_train::Error>(losses)
        });
        losses.unwrap_or_else(|error| panic!("{error}")).swap_remove(0)
    };
    let (overlapped, waited) = (losses(true), losses(false));
    assert_eq!(overlapped, waited);
    assert!(overlapped[0] != overlapped[1] && overlapped[1] != overlapped[2]);
}
