//! Overlaps of a forward and a backward pass on ranks as threads: the same bits as one after the other, and rows that travel while the
//! other pass computes.

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
use moe_pipeline::Stage;
use moe_topology::{Attention, Folding, Mapping};

const LAYERS: usize = 3;
const SEQUENCE: usize = 8;
const BATCH: usize = 2;
const MICRO_BATCHES: u32 = 4;
const VOCAB: usize = 32;

#[derive(Clone)]
struct Case {
    mapping: Mapping,
    recompute: &'static [RecomputeModule],
    shared_expert_overlap: bool,
}

impl Case {
    /// A dense layer and two of experts, with a shared expert and auxiliary losses.
    fn config(&self) -> ModelConfig {
        serde_json::from_value(serde_json::json!({
            "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.01
        }))
        .unwrap()
    }

    fn mappings() -> [Mapping; 3] {
        [
            Mapping { world_size: 2, ep: 2, ..Mapping::default() },
            Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() },
            Mapping { world_size: 4, tp: 2, ep: 2, etp: 2, ..Mapping::default() },
        ]
    }
}

/// What a rank made of a step.
#[derive(Debug, PartialEq)]
struct Made {
    loss: f64,
    gradients: Vec<Vec<f64>>,
    routers: Vec<RouterStats>,
}

/// All micro-batches forward and backward, one pass ahead, in overlaps if `woven`; and what each of them did with communicators.
fn step(case: &Case, woven: bool) -> Vec<(Made, Vec<Vec<Event>>)> {
    let (case, world_size) = (case.clone(), case.mapping.world_size);
    let body = move |rank| -> Result<(Made, Vec<Vec<Event>>)> {
        let (device, trace) = (Cpu::poisoned(1), Trace::default());
        let (folding, config) = (Folding::new(case.mapping.clone())?, case.config());
        let world = Traced::new(rank, trace.clone());
        let rank = World::<Cpu>::rank(&world);
        let recompute = RecomputeModules::new(case.recompute, &config)?;
        let execution = Execution {
            recompute,
            shared_expert_overlap: case.shared_expert_overlap,
            ..Execution::default()
        };
        let mut layout = ParamLayoutBuilder::new(&folding, rank);
        let stages = PipelineLayout::even(LAYERS, 1, 1)?;
        let stage = DecoderStage::of_rank(&mut layout, &config, execution, &stages)?.remove(0);
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
        cx.stats.moe = DecoderStage::moe_stats([&stage], &device)?;
        let own = rank / case.mapping.tp % dp;
        for m in 0..MICRO_BATCHES as usize {
            let token = |i: usize| ((i * i * 7 + 5 * m + 11 * own) % VOCAB) as i32;
            let ids = Vec::from_iter((0..tokens).map(token));
            let labels = Vec::from_iter((1..=tokens).map(token));
            let at = Vec::from_iter((0..tokens).map(|i| (i / BATCH) as i32));
            let all = objective.tokens as f64;
            cx.batches.push(MicroBatch::new(&device, BATCH, &ids, &at, &labels, &vec![1.0; tokens], all)?);
        }
        let stage = TypedStage::new(stage);
        trace.take();
        let mut events = Vec::new();
        let (_, mut saved) = stage.forward(0, None, &mut cx)?;
        trace.take();
        for m in 1..MICRO_BATCHES {
            saved = match woven {
                true => stage.overlap((m, None), &stage, (m - 1, None, saved), &mut cx)?.0.1,
                false => {
                    let (_, next) = stage.forward(m, None, &mut cx)?;
                    stage.backward(m - 1, None, saved, &mut cx)?;
                    next
                }
            };
            events.push(trace.take());
        }
        stage.backward(MICRO_BATCHES - 1, None, saved, &mut cx)?;
        cx.params.start_reductions(&cx.comms)?;
        let gradients = (0..cx.params.buckets().len())
            .map(|bucket| Ok(Tensor::to_vec(&cx.params.reduced(bucket)?, &device)?))
            .collect::<Result<_>>()?;
        let loss = cx.stats.loss.total(&device)?;
        let routers = cx.stats.moe.read(&device)?.into_values().collect();
        Ok((Made { loss, gradients, routers }, events))
    };
    ThreadWorld::run(world_size, Duration::from_secs(60), body).unwrap()
}

/// Movements of rows that other collectives were started beside (those of attention and of the router; a router's exchange of counts
/// is one too), and the most operations of movements that were under way at once.
fn hidden(events: &[Event]) -> (usize, usize) {
    let (mut beside, mut most) = (0, 0);
    let mut under_way: Vec<(u64, bool)> = Vec::new();
    for event in events {
        match (event.moment, event.op.starts_with("all_to_all")) {
            (Moment::Start, true) => under_way.push((event.number, false)),
            (Moment::Start, false) => under_way.iter_mut().for_each(|(_, hidden)| *hidden = true),
            (Moment::Wait, true) => {
                let at = under_way.iter().position(|(number, _)| *number == event.number).unwrap();
                beside += usize::from(under_way.remove(at).1);
            }
            (Moment::Wait, false) => {}
        }
        most = most.max(under_way.len());
    }
    assert!(under_way.is_empty());
    (beside, most)
}

#[test]
fn no_bit_depends_on_it() {
    let plain = |mapping| Case { mapping, recompute: &[], shared_expert_overlap: false };
    let mut cases = Vec::from(Case::mappings().map(plain));
    use RecomputeModule::{CoreAttn, Full, Layernorm, Moe, MoeAct, SharedExperts};
    let all: [&[RecomputeModule]; 3] = [&[Full], &[Moe, Layernorm], &[CoreAttn, MoeAct, SharedExperts]];
    let [_, mapping, _] = Case::mappings();
    cases.extend(all.map(|recompute| Case { recompute, ..plain(mapping.clone()) }));
    cases.push(Case { shared_expert_overlap: true, ..plain(mapping) });
    for case in &cases {
        let (woven, serial) = (step(case, true), step(case, false));
        for ((woven, _), (serial, _)) in woven.iter().zip(&serial) {
            assert_eq!(woven, serial, "{:?} {:?}", case.mapping, case.recompute);
            assert!(serial.loss > 0.0 && serial.gradients.iter().flatten().any(|g| *g != 0.0));
        }
    }
}

/// By the order in which operations are started and waited for: one after the other, each movement of rows is waited for before anything
/// else begins; woven, attention of the other pass is at work (its collectives over TP are started) beside dispatch and combine,
/// and rows of both passes are under way together. All ranks of a group do the same in the same order.
#[test]
fn rows_travel_while_the_other_pass_computes() {
    let [_, mapping, _] = Case::mappings();
    let case = Case { mapping, recompute: &[], shared_expert_overlap: false };
    let (woven, serial) = (step(&case, true), step(&case, false));
    for ((_, woven), (_, serial)) in woven.iter().zip(&serial) {
        for (woven, serial) in woven.iter().zip(serial) {
            let (beside, most) = hidden(serial);
            assert_eq!(beside, 0);
            let (woven_beside, woven_most) = hidden(woven);
            // Of two layers: the gradient of combine and combine, each beside the other pass's attention.
            assert!(woven_beside >= 4, "{woven_beside}");
            assert!(woven_most > most, "{woven_most} at once, {most} one after the other");
        }
    }
    let order = |events: &Vec<Vec<Event>>| {
        let of = |event: &Event| (event.moment, event.op, event.group);
        events.iter().flatten().map(of).collect::<Vec<_>>()
    };
    assert!(woven.iter().all(|(_, events)| order(events) == order(&woven[0].1)));
}
