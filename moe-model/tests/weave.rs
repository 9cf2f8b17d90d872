//! Overlaps of a forward and a backward pass on ranks as threads: the same bits as one after the other, and rows that travel while
//! something else computes.

use std::time::Duration;

use moe_comm::trace::{Event, Moment, Trace, Traced};
use moe_comm::{ThreadWorld, World};
use moe_dispatch::RouterStats;
use moe_kernels::{Cpu, Tensor};
use moe_model::axes::communicators;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{
    Cx, DecoderStage, Execution, MicroBatch, Mode, ModelConfig, Objective, PipelineLayout, RecomputeModule,
    RecomputeModules, Result, RopeTable, TypedStage,
};
use moe_pipeline::weave::{Layer, LayerCost, Node, Order, Part, Phase, Step, weave};
use moe_pipeline::{Stage, StageCost};
use moe_topology::{Attention, Folding, Mapping};

const LAYERS: usize = 3;
const SEQUENCE: usize = 8;
const BATCH: usize = 2;
const MICRO_BATCHES: u32 = 4;
const VOCAB: usize = 32;

#[derive(Clone)]
struct Case {
    mapping: Mapping,
    /// Layers of the rank's stages.
    stages: &'static [usize],
    recompute: &'static [RecomputeModule],
    shared_expert_overlap: bool,
}

impl Case {
    fn plain(mapping: Mapping) -> Self {
        Case { mapping, stages: &[LAYERS], recompute: &[], shared_expert_overlap: false }
    }

    fn mappings() -> [Mapping; 3] {
        [
            Mapping { world_size: 2, ep: 2, ..Mapping::default() },
            Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() },
            Mapping { world_size: 4, tp: 2, ep: 2, etp: 2, ..Mapping::default() },
        ]
    }
}

/// A dense layer and then layers of experts, with a shared expert and auxiliary losses.
fn config(layers: usize) -> ModelConfig {
    serde_json::from_value(serde_json::json!({
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.01
    }))
    .unwrap()
}

/// What a rank made of a step.
#[derive(Debug, PartialEq)]
struct Made {
    loss: f64,
    gradients: Vec<Vec<f64>>,
    routers: Vec<RouterStats>,
}

/// A step of a rank: what it made, the orders of its stages' overlaps, and what each overlap did with communicators.
struct Done {
    made: Made,
    orders: Vec<Option<Order>>,
    events: Vec<Vec<Event>>,
}

/// All micro-batches forward and backward, one ahead, in overlaps of the first stage's forward with the last one's backward pass, and
/// so on.
fn step(case: &Case, woven: bool) -> Vec<Done> {
    let (case, world_size) = (case.clone(), case.mapping.world_size);
    let body = move |rank| -> Result<Done> {
        let (device, trace) = (Cpu::poisoned(1), Trace::default());
        let (folding, config) = (Folding::new(case.mapping.clone())?, config(LAYERS));
        let world = Traced::new(rank, trace.clone());
        let rank = World::<Cpu>::rank(&world);
        let recompute = RecomputeModules::new(case.recompute, &config)?;
        let execution = Execution {
            recompute,
            shared_expert_overlap: case.shared_expert_overlap,
            ..Execution::default()
        };
        let mut layout = ParamLayoutBuilder::new(&folding, rank);
        let pipeline = PipelineLayout::new(LAYERS, 1, case.stages)?;
        let mut stages = DecoderStage::of_rank(&mut layout, &config, execution, &pipeline)?;
        if woven {
            DecoderStage::weave(&mut stages)?;
        }
        let params = ParamStore::<f64, Cpu>::new(layout.build(), 1, &device)?;
        let comms = communicators::<Cpu>().build(&world, &device, &folding)?;
        let rope = RopeTable::of(&device, &config, SEQUENCE)?;
        let (dp, tokens) = (folding.size(Attention::DP), SEQUENCE * BATCH);
        let micro_batches = MICRO_BATCHES as usize * dp;
        let objective =
            Objective { micro_batches, sequences: micro_batches * BATCH, tokens: micro_batches * tokens };
        let mut cx = Cx::new(device.clone(), comms, params, rope, objective);
        cx.mode = Mode::Train { seed: 0, step: 1 };
        cx.params.zero_grads(true);
        cx.stats.moe = DecoderStage::moe_stats(&stages, &device)?;
        let own = rank / case.mapping.tp % dp;
        for m in 0..MICRO_BATCHES as usize {
            let token = |i: usize| ((i * i * 7 + 5 * m + 11 * own) % VOCAB) as i32;
            let ids = Vec::from_iter((0..tokens).map(token));
            let labels = Vec::from_iter((1..=tokens).map(token));
            let at = Vec::from_iter((0..tokens).map(|i| (i / BATCH) as i32));
            let all = objective.tokens as f64;
            cx.batches.push(MicroBatch::new(&device, BATCH, &ids, &at, &labels, &vec![1.0; tokens], all)?);
        }
        let stages = Vec::from_iter(stages.into_iter().map(TypedStage::new));
        let pairs = || stages.iter().zip(stages.iter().rev());
        let orders = pairs().map(|(stage, back)| stage.order(back).cloned()).collect();
        let (mut saved, mut events) = (Vec::new(), Vec::new());
        let mut x = None;
        for stage in &stages {
            let (y, kept) = stage.forward(0, x, &mut cx)?;
            saved.push(kept);
            x = y;
        }
        for m in 1..MICRO_BATCHES {
            let mut next = Vec::new();
            let (mut x, mut dy) = (None, None);
            for (stage, back) in pairs() {
                trace.take();
                let backward = (m - 1, dy, saved.pop().unwrap());
                let ((y, kept), dx) = stage.overlap((m, x), back, backward, &mut cx)?;
                events.push(trace.take());
                next.push(kept);
                (x, dy) = (y, dx);
            }
            saved = next;
        }
        let mut dy = None;
        for stage in stages.iter().rev() {
            dy = stage.backward(MICRO_BATCHES - 1, dy, saved.pop().unwrap(), &mut cx)?;
        }
        cx.params.start_reductions(&cx.comms)?;
        let gradients = (0..cx.params.buckets().len())
            .map(|bucket| Ok(Tensor::to_vec(&cx.params.reduced(bucket)?, &device)?))
            .collect::<Result<_>>()?;
        let loss = cx.stats.loss.total(&device)?;
        let routers = cx.stats.moe.read(&device)?.into_values().collect();
        Ok(Done { made: Made { loss, gradients, routers }, orders, events })
    };
    ThreadWorld::run(world_size, Duration::from_secs(60), body).unwrap()
}

/// Without the numbers, which other ranks and passes count otherwise.
fn order_of(events: &[Event]) -> Vec<(Moment, &'static str, String)> {
    events.iter().map(|event| (event.moment, event.op, event.group.to_string())).collect()
}

#[test]
fn no_bit_depends_on_it() {
    let mut cases = Vec::from(Case::mappings().map(Case::plain));
    use RecomputeModule::{CoreAttn, Full, Layernorm, Mlp, Moe, MoeAct, SharedExperts};
    let all: [&[RecomputeModule]; 3] = [&[Full], &[Moe, Mlp, Layernorm], &[CoreAttn, MoeAct, SharedExperts]];
    let [_, mapping, _] = Case::mappings();
    let plain = Case::plain(mapping);
    cases.extend(all.map(|recompute| Case { recompute, ..plain.clone() }));
    cases.push(Case { shared_expert_overlap: true, ..plain.clone() });
    // A dense stage and one of experts, then two that both have experts.
    let stages: [&[usize]; 2] = [&[1, 2], &[2, 1]];
    cases.extend(stages.map(|stages| Case { stages, ..plain.clone() }));
    cases.push(Case { stages: &[1, 2], recompute: &[Full], ..plain });
    for case in &cases {
        let what = format!("{:?} {:?} {:?}", case.mapping, case.stages, case.recompute);
        for (woven, serial) in step(case, true).iter().zip(step(case, false)) {
            assert_eq!(woven.made, serial.made, "{what}");
            assert!(serial.made.loss > 0.0 && serial.made.gradients.iter().flatten().any(|g| *g != 0.0));
            assert!(woven.orders.iter().all(Option::is_some) && serial.orders.iter().all(Option::is_none));
            for (woven, serial) in woven.events.iter().zip(&serial.events) {
                assert_ne!(order_of(woven), order_of(serial), "{what}");
            }
        }
    }
}

fn is_row_movement(event: &Event) -> bool {
    event.op.starts_with("all_to_all")
}

/// Whether it calls collectives, over TP: attention, dense layers, and the shared expert, which goes with the experts forward and with
/// attention backward.
fn calls(node: Node) -> bool {
    match (node.phase, node.part) {
        (Phase::WeightGradient, _) | (Phase::InputGradient, Part::Experts) => false,
        (_, part) => !part.is_all_to_all(),
    }
}

/// Holds what an overlap did to its order: each movement of rows is started and waited for where the order says, and so are the
/// collectives of what is computed in between. A layer that is made again is made with the experts' gradient, rows brought and awaited.
fn follows(order: &Order, events: &[Event], made_again: bool) {
    let mut events = events.iter().peekable();
    let mut under_way: Vec<(Node, Vec<u64>)> = Vec::new();
    let (mut computed, mut first) = (false, true);
    for &step in order.steps() {
        let node = step.node();
        let moment = match step {
            Step::Compute(_)
                if made_again && (node.phase, node.part) == (Phase::InputGradient, Part::Experts) =>
            {
                while events.next_if(|event| !is_row_movement(event)).is_some() {}
                for moment in [Moment::Start, Moment::Start, Moment::Wait, Moment::Wait] {
                    let event = events.next().unwrap();
                    assert!(is_row_movement(event) && event.moment == moment, "{event:?} within {step}");
                }
                // Then the shared expert.
                computed = true;
                continue;
            }
            Step::Compute(_) => {
                computed |= calls(node);
                continue;
            }
            Step::Start(_) => Moment::Start,
            Step::Wait(_) => Moment::Wait,
        };
        let mut between = 0;
        while events.next_if(|event| !is_row_movement(event)).is_some() {
            between += 1;
        }
        // Embedding and head come before the first step.
        assert!(first || (between > 0) == computed, "{between} calls before {step}");
        (computed, first) = (false, false);
        // Probabilities, or their gradients, travel beside the rows of dispatch.
        let messages = if node.part == Part::Dispatch { 2 } else { 1 };
        let mut numbers = Vec::new();
        for _ in 0..messages {
            let event = events.next().unwrap();
            assert!(is_row_movement(event) && event.moment == moment, "{event:?} is not {step}");
            numbers.push(event.number);
        }
        numbers.sort_unstable();
        match moment {
            Moment::Start => under_way.push((node, numbers)),
            Moment::Wait => {
                let at = under_way.iter().position(|(other, _)| *other == node).unwrap();
                assert_eq!(under_way.remove(at).1, numbers, "{step}");
            }
        }
    }
    assert!(!events.any(is_row_movement) && under_way.is_empty());
}

/// The movements of rows beside which an order computes something that does not wait for them.
fn hidden(order: &Order) -> Vec<Node> {
    let at = |step| order.steps().iter().position(|other| *other == step).unwrap();
    let beside = |node: &Node| {
        order.steps()[at(Step::Start(*node))..at(Step::Wait(*node))].iter().any(|step| match step {
            Step::Compute(other) => other.phase != node.phase,
            _ => false,
        })
    };
    order.all_to_alls().filter(beside).collect()
}

/// Each movement of rows, by the order of events: one after the other, it is waited for before anything else begins; woven, something
/// else is computed between its start and its wait, as far as there is enough of it. All ranks do the same in the same order.
#[test]
fn rows_travel_while_something_else_computes() {
    let [_, mapping, _] = Case::mappings();
    // Of 4 movements for each pass through two layers of experts; a dense layer has two parts to hide them behind.
    for (stages, hides, recompute) in [
        (&[3][..], &[8][..], &[][..]),
        (&[1, 2], &[4, 2], &[]),
        (&[2, 1], &[4, 4], &[]),
        (&[3], &[8], &[RecomputeModule::Full]),
    ] {
        let case = Case { stages, recompute, ..Case::plain(mapping.clone()) };
        let (woven, serial) = (step(&case, true), step(&case, false));
        for (woven, serial) in woven.iter().zip(&serial) {
            for (overlap, events) in woven.events.iter().enumerate() {
                let order = woven.orders[overlap % stages.len()].as_ref().unwrap();
                follows(order, events, !recompute.is_empty());
                assert_eq!(hidden(order).len(), hides[overlap % stages.len()], "{stages:?}: {order}");
            }
            for events in &serial.events {
                let mut under_way = 0;
                for event in events {
                    assert!(is_row_movement(event) || under_way == 0, "{event:?} beside rows");
                    match (is_row_movement(event), event.moment) {
                        (true, Moment::Start) => under_way += 1,
                        (true, Moment::Wait) => under_way -= 1,
                        _ => {}
                    }
                    assert!(under_way <= 2);
                }
            }
        }
        let order = |done: &Done| done.events.iter().map(|events| order_of(events)).collect::<Vec<_>>();
        assert!(woven.iter().all(|done| order(done) == order(&woven[0])));
    }
}

/// Orders of many layers put off the weight gradients of one layer at most, and take little longer than the shortest for their
/// all-to-alls, however long these are.
#[test]
fn orders_serve_all_to_alls_of_any_length() {
    let layers = 12;
    let folding = Folding::new(Mapping { world_size: 2, ep: 2, ..Mapping::default() }).unwrap();
    for stages in [&[12][..], &[6, 6], &[1, 4, 4, 3], &[3, 3, 3, 3]] {
        let pipeline = PipelineLayout::new(layers, 1, stages).unwrap();
        let mut params = ParamLayoutBuilder::new(&folding, 0);
        let mut stages =
            DecoderStage::of_rank(&mut params, &config(layers), Execution::default(), &pipeline).unwrap();
        DecoderStage::weave(&mut stages).unwrap();
        for (forward, backward) in stages.iter().flat_map(|f| stages.iter().map(move |b| (f, b))) {
            let Some(order) = forward.order(backward) else {
                // Two dense passes.
                assert!(stages.len() == 4 && std::ptr::eq(forward, backward));
                continue;
            };
            assert!(order.deferred() <= 2, "{order}");
            for all_to_all in [0.25, 0.5, 1.0, 2.0, 4.0] {
                let one = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
                let two = StageCost { forward: 2.0, backward_input: 2.0, backward_weight: 2.0 };
                let cost = |layer: &Layer| match layer {
                    Layer::Moe => LayerCost::Moe { attention: one, experts: one, all_to_all },
                    Layer::Dense => LayerCost::Dense(two),
                };
                let costs = |layers: &[Layer]| layers.iter().map(cost).collect::<Vec<_>>();
                let (f, b) = (costs(order.forward()), costs(order.backward()));
                let length = |order: &Order| order.simulate(&f, &b).unwrap().makespan;
                let (took, shortest) = (length(order), length(&weave(&f, &b).unwrap()));
                assert!(took <= 1.1 * shortest, "{took} instead of {shortest}, {all_to_all}: {order}");
            }
        }
    }
}

/// Where no rows travel, nothing is woven: experts on one rank, or dense layers alone.
#[test]
fn nothing_is_woven_where_no_rows_travel() {
    for (ep, stages, woven) in [(1, &[1, 2], [[false; 2]; 2]), (2, &[1, 2], [[false, true], [true; 2]])] {
        let folding = Folding::new(Mapping { world_size: ep, ep, ..Mapping::default() }).unwrap();
        let pipeline = PipelineLayout::new(LAYERS, 1, stages).unwrap();
        let mut params = ParamLayoutBuilder::new(&folding, 0);
        let mut stages =
            DecoderStage::of_rank(&mut params, &config(LAYERS), Execution::default(), &pipeline).unwrap();
        DecoderStage::weave(&mut stages).unwrap();
        let found = [0, 1].map(|f| [0, 1].map(|b| stages[f].order(&stages[b]).is_some()));
        assert_eq!(found, woven, "EP {ep}");
    }
}
