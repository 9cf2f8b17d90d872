//! What layers keep for their backward pass, and what recomputation saves of it: the formulas of docs/recompute.md
//! against the counters of the device's allocator.
//!
//! The table there: `cargo test -p moe-train --test recompute_memory table -- --nocapture`.

mod common;

use common::{DEADLINE, RandomBatches, setup, tiny_model};
use moe_comm::{ThreadRank, ThreadWorld, World};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::{Backend, Cpu, Device, Float, Tensor};
use moe_model::RecomputeModule::{self, CoreAttn, Full, Layernorm, Mlp, Moe, MoeAct, SharedExperts};
use moe_model::axes::communicators;
use moe_model::config::QkNormScope;
use moe_model::context::positions;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::recompute::Recompute;
use moe_model::{
    Block, Cx, Execution, Layer, MicroBatch, Mode, ModelConfig, Objective, PipelineLayout, RecomputeModules,
    RopeTable,
};
use moe_topology::{Attention, Expert, Folding, Mapping};
use moe_train::trainer::{RankTrainer, Setup};

const SEQUENCE: usize = 48;
const BATCH: usize = 2;

/// Experts and a gated shared one in every layer.
fn model() -> ModelConfig {
    ModelConfig {
        hidden_size: 32,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: Some(8),
        num_local_experts: 4,
        intermediate_size: 24,
        moe_intermediate_size: Some(20),
        shared_expert_intermediate_size: Some(28),
        use_qk_norm: true,
        ..tiny_model()
    }
}

/// Queries and keys are normed over all heads together.
fn projection_norms() -> ModelConfig {
    ModelConfig { qk_norm_scope: QkNormScope::Projection, ..model() }
}

fn dense() -> ModelConfig {
    ModelConfig { first_k_dense_replace: usize::MAX, shared_expert_intermediate_size: None, ..model() }
}

fn latent() -> ModelConfig {
    ModelConfig {
        num_key_value_heads: 4,
        head_dim: None,
        use_qk_norm: false,
        q_lora_rank: Some(10),
        kv_lora_rank: Some(14),
        qk_nope_head_dim: Some(6),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        shared_expert_intermediate_size: None,
        n_shared_experts: Some(1),
        ..model()
    }
}

/// Bytes that a layer keeps of a micro-batch, as docs/recompute.md has them.
struct Kept<'a> {
    model: &'a ModelConfig,
    folding: &'a Folding,
    dispatcher: DispatcherKind,
    /// Bytes of an activation, and of an accumulated number.
    t: usize,
    a: usize,
}

impl Kept<'_> {
    fn size(&self, of: usize, parts: usize) -> usize {
        assert!(of.is_multiple_of(parts));
        of / parts
    }

    /// Rows of this rank.
    fn rows(&self) -> usize {
        self.size(BATCH * SEQUENCE, self.folding.size(Attention::TP | Attention::CP))
    }

    /// What the projections keep, besides queries, keys and values; these and the output of attention as `(queries and
    /// keys and values, output)`, bytes of a gathered row.
    fn attention(&self) -> (usize, usize, usize) {
        let (Kept { model, t, a, .. }, tp) = (self, self.folding.size(Attention::TP));
        let (rows, h) = (self.rows(), self.size(model.num_attention_heads, tp));
        match model.latent_attention() {
            Some(latent) => {
                let low = latent.kv_lora_rank + latent.qk_rope_head_dim;
                let (made, gathered, norms) = match latent.q_lora_rank {
                    Some(rank) => (low + rank, low + rank, 2),
                    None => (low, low + model.hidden_size, 1),
                };
                let (qk, v) = (latent.qk_head_dim(), latent.v_head_dim);
                (rows * ((made + gathered) * t + norms * a), h * (2 * qk + v) * t, h * (v * t + a))
            }
            None => {
                let (k, d) = (self.size(model.num_key_value_heads, tp), model.head_dim());
                let ulysses = self.folding.size(Attention::CP_INNER);
                let norms = match (model.use_qk_norm, model.qk_norm_scope) {
                    (false, _) => 0,
                    (true, QkNormScope::Head) => rows * tp * (h + k) * (d * t + a),
                    (true, QkNormScope::Projection) => rows * tp * ((h + k) * d * t + 2 * a),
                };
                (norms, (h + 2 * k.max(ulysses)) * d * t, h * (d * t + a))
            }
        }
    }

    /// Of a layer whose experts get `expert_rows` rows on this rank.
    fn layer(&self, moe: bool, expert_rows: usize, recompute: &[RecomputeModule]) -> usize {
        let (&Kept { model, folding, dispatcher, t, a }, rows) = (self, self.rows());
        let (tp, ep) = (folding.size(Attention::TP), folding.size(Expert::EP));
        let keeps = |modules: &[RecomputeModule]| !modules.iter().any(|module| recompute.contains(module));
        let unless = |modules: &[RecomputeModule], bytes: usize| if keeps(modules) { bytes } else { 0 };
        let (x, rms, gathered) = (rows * model.hidden_size * t, rows * a, rows * tp);
        let (projections, qkv, o) = self.attention();
        let again =
            if folding.size(Attention::CP_INNER) > 1 { o - a * model.num_attention_heads / tp } else { 0 };
        let attention = x
            + unless(&[Full], rms + projections + gathered * qkv)
            + unless(&[Full, Layernorm], x)
            + unless(&[Full, CoreAttn], gathered * (o + again));
        if !moe {
            let inner = self.size(model.intermediate_size, tp);
            return attention
                + unless(&[Full], x)
                + unless(&[Full, Mlp], rms + 3 * gathered * inner * t)
                + unless(&[Full, Mlp, Layernorm], x);
        }
        let (e, k) = (model.num_local_experts, model.num_experts_per_tok);
        let spread = folding.size(Expert::EP | Expert::ETP);
        let choices = rows * (e * a + k * (a + 4)) + 8 * BATCH * (e + 1);
        let routing = match (dispatcher, spread) {
            (_, 1) => choices + 4 * (3 * rows * k + e + 1),
            (AllToAll, _) => choices + 4 * (3 * rows * k + e + 1 + 2 * expert_rows + e / ep + 1),
            (_, _) => choices + 4 * (3 * rows * spread * k + e / ep + 1),
        };
        let inner = self.size(model.expert_width(), folding.size(Expert::ETP));
        let shared = match (model.shared_expert_intermediate_size, model.n_shared_experts) {
            (Some(inner), _) => 3 * gathered * inner / tp * t + rows * (model.hidden_size + 1) * t,
            (None, Some(n)) => 3 * gathered * n * model.expert_width() / tp * t,
            (None, None) => 0,
        };
        attention
            + routing
            + unless(&[Full], x)
            + unless(&[Full, Moe], rms + expert_rows * (model.hidden_size * t + a + 2 * inner * t))
            + unless(&[Full, Moe, Layernorm], x)
            + unless(&[Full, Moe, MoeAct], expert_rows * inner * t)
            + unless(&[Full, Moe, SharedExperts], shared)
    }
}

/// What stays of a forward pass of one layer on this rank, when its output is gone.
fn measure<T: Float>(world: &ThreadRank, setup: &Setup) -> moe_model::Result<usize>
where
    Cpu: Backend<T>,
{
    let (device, rank) = (Cpu::new(1), World::<Cpu>::rank(world));
    let (model, folding) = (&setup.model, &setup.folding);
    let mut layout = ParamLayoutBuilder::new(folding, rank);
    let full = setup.recompute.contains(Full);
    let recompute = if full { RecomputeModules::default() } else { setup.recompute };
    let execution = Execution { dispatcher: setup.dispatcher, recompute, ..Execution::default() };
    let layer = Recompute { layer: Block::new(&mut layout, model, execution, 0, 0)?, enabled: full };
    let params = ParamStore::<T, Cpu>::new(layout.build(), 1, &device)?;
    let comms = communicators::<Cpu>().build(world, &device, folding)?;
    let rope = RopeTable::of(&device, model, SEQUENCE)?;
    let objective = Objective { micro_batches: 1, sequences: BATCH, tokens: BATCH * SEQUENCE };
    let mut cx = Cx::new(device.clone(), comms, params, rope, objective);
    cx.mode = Mode::Train { seed: 0, step: 1 };
    let (cp, c) = (folding.size(Attention::CP), folding.coordinate(rank, Attention::CP));
    let at: Vec<i32> = positions(SEQUENCE, cp, c)?.flat_map(|p| [p as i32; BATCH]).collect();
    let zeros = vec![0; at.len()];
    cx.batches = vec![MicroBatch::new(&device, BATCH, &zeros, &at, &zeros, &vec![1.0; at.len()], 1.0)?];

    let rows = at.len() / folding.size(Attention::TP);
    let values: Vec<f64> =
        (0..rows * model.hidden_size).map(|i| ((i * 37 + rank * 101) as f64).sin()).collect();
    let before = device.memory().live;
    let x = Tensor::from_f64(&device, rows, model.hidden_size, &values)?;
    let (y, _saved) = layer.forward(0, x.into(), &mut cx)?;
    drop(y);
    Ok(device.memory().live - before)
}

fn folded(model: ModelConfig, (tp, cp, ulysses, etp, ep): (usize, usize, usize, usize, usize)) -> Setup {
    let mapping = Mapping { world_size: tp * cp, tp, cp, etp, ep, ..Mapping::default() };
    setup(model, mapping.split(Attention::CP_INNER, ulysses))
}

/// Over all ranks, since how many rows the experts of one rank get is up to the router.
fn kept_to_the_byte<T: Float>(setup: Setup, names: &'static [RecomputeModule])
where
    Cpu: Backend<T>,
{
    let recompute = RecomputeModules::new(names, &setup.model).unwrap();
    let setup = Setup { recompute, ..setup };
    let folding = setup.folding.clone();
    let (t, a) = (size_of::<T>(), size_of::<T::Acc>());
    let kept = Kept { model: &setup.model, folding: &folding, dispatcher: setup.dispatcher, t, a };
    let (ranks, etp) = (folding.world_size(), folding.size(Expert::ETP));
    let expert_rows = kept.rows() * setup.model.num_experts_per_tok * etp;
    let theory = ranks * kept.layer(setup.model.is_moe_layer(0), expert_rows, names);
    let (measured, of) = (setup.clone(), format!("{names:?}, {}, {}", setup.dispatcher, folding.mapping()));
    let measured = ThreadWorld::run(ranks, DEADLINE, move |world| measure::<T>(&world, &measured));
    let measured = measured.unwrap_or_else(|error| panic!("{of}: {error}")).into_iter().sum::<usize>();
    assert_eq!(measured, theory, "{of}");
}

#[test]
fn layers_keep_what_the_formulas_say_to_the_byte() {
    let of_experts: [&[RecomputeModule]; 9] = [
        &[],
        &[Full],
        &[CoreAttn],
        &[Layernorm],
        &[Moe],
        &[MoeAct],
        &[SharedExperts],
        &[CoreAttn, Layernorm, MoeAct, SharedExperts],
        &[CoreAttn, Layernorm, Moe],
    ];
    for sizes in [(1, 1, 1, 1, 1), (2, 1, 1, 1, 2), (1, 2, 1, 2, 1), (2, 2, 2, 2, 2)] {
        for names in of_experts {
            kept_to_the_byte::<f64>(folded(model(), sizes), names);
            kept_to_the_byte::<f32>(folded(latent(), sizes), names);
            kept_to_the_byte::<f32>(folded(projection_norms(), sizes), names);
        }
        kept_to_the_byte::<f64>(folded(projection_norms(), sizes), &[]);
        kept_to_the_byte::<f64>(Setup { dispatcher: AllGather, ..folded(model(), sizes) }, &[]);
        kept_to_the_byte::<f64>(Setup { dispatcher: AllGather, ..folded(model(), sizes) }, &[Moe]);
        for names in [&[][..], &[Full], &[Mlp], &[Layernorm], &[Mlp, CoreAttn, Layernorm]] {
            kept_to_the_byte::<f32>(folded(dense(), sizes), names);
        }
    }
}

/// The peak of a step's activations, in bytes, on each rank: above what lives between steps.
fn peaks(setup: &Setup, names: &[RecomputeModule]) -> Vec<usize> {
    let recompute = RecomputeModules::new(names, &setup.model).unwrap();
    let setup = Setup { recompute, ..setup.clone() };
    let source = RandomBatches { vocab: 37, seq_len: SEQUENCE, micro_batch: BATCH };
    ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let device = Cpu::new(1);
        let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, device.clone())?;
        let before = device.memory().live;
        device.reset_peak();
        trainer.step(1, &source)?;
        Ok::<_, moe_train::Error>(device.memory().peak - before)
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

const LAYERS: usize = 16;

/// 16 layers on each rank, with as many micro-batches as it takes to fill the pipeline.
fn deep(model: ModelConfig, (tp, pp, etp, ep): (usize, usize, usize, usize)) -> Setup {
    let model = ModelConfig { num_hidden_layers: LAYERS * pp, ..model };
    let mapping = Mapping { world_size: tp * pp, tp, pp, etp, ep, ..Mapping::default() };
    Setup {
        pipeline: PipelineLayout::even(LAYERS * pp, pp, 1).unwrap(),
        global_batch_size: 3 * BATCH,
        micro_batch_size: BATCH,
        sequence_length: SEQUENCE,
        ..setup(model, mapping)
    }
}

/// By how much `names` should lower the sum of the peaks of all ranks: in all layers of all micro-batches in flight
/// but the one layer whose backward pass runs.
fn saves(setup: &Setup, names: &[RecomputeModule]) -> f64 {
    let Setup { model, folding, .. } = setup;
    let kept = Kept { model, folding, dispatcher: setup.dispatcher, t: 4, a: 4 };
    let expert_rows = kept.rows() * model.num_experts_per_tok * folding.size(Expert::ETP);
    let layer = |names| kept.layer(model.is_moe_layer(0), expert_rows, names);
    let of_layer = layer(&[]) - layer(names);
    let pp = folding.size(Attention::PP);
    let layers: usize = (0..pp).map(|stage| LAYERS * (pp - stage) - 1).sum();
    (of_layer * layers * folding.world_size() / pp) as f64
}

#[test]
fn peaks_fall_by_what_the_formulas_say() {
    let (experts, dense) = (model(), dense());
    let cases: [(&[RecomputeModule], &ModelConfig); 9] = [
        (&[Full], &experts),
        (&[CoreAttn], &experts),
        (&[Layernorm], &experts),
        (&[Moe], &experts),
        (&[MoeAct], &experts),
        (&[SharedExperts], &experts),
        (&[CoreAttn, Layernorm, MoeAct, SharedExperts], &experts),
        (&[Mlp], &dense),
        (&[Full], &dense),
    ];
    for sizes in [(1, 1, 1, 1), (2, 2, 1, 2)] {
        for model in [&experts, &dense] {
            let setup = deep(model.clone(), sizes);
            let whole: usize = peaks(&setup, &[]).iter().sum();
            for (names, _) in cases.iter().filter(|(_, of)| *of == model) {
                let measured = (whole - peaks(&setup, names).iter().sum::<usize>()) as f64;
                let theory = saves(&setup, names);
                assert!(
                    (measured / theory - 1.0).abs() < 0.1,
                    "{names:?} under {}: saves {measured}, where theory says {theory}",
                    setup.folding.mapping()
                );
            }
        }
    }
}

/// Prints the table of docs/recompute.md.
#[test]
fn table() {
    let setup = deep(model(), (1, 1, 1, 1));
    let Setup { model, folding, dispatcher, .. } = &setup;
    let kept = Kept { model, folding, dispatcher: *dispatcher, t: 4, a: 4 };
    let expert_rows = kept.rows() * model.num_experts_per_tok;
    let whole = peaks(&setup, &[])[0];
    let kib = |bytes: f64| format!("{:.1}", bytes / 1024.0);
    println!("| recompute | kept by a layer, KiB | peak, KiB | saved, KiB | by theory | measured / theory |");
    println!("|---|---|---|---|---|---|");
    println!(
        "| nothing | {} | {} | | | |",
        kib(kept.layer(true, expert_rows, &[]) as f64),
        kib(whole as f64)
    );
    let together: [&[RecomputeModule]; 8] = [
        &[Layernorm],
        &[MoeAct],
        &[CoreAttn],
        &[SharedExperts],
        &[CoreAttn, Layernorm, MoeAct, SharedExperts],
        &[Moe],
        &[CoreAttn, Layernorm, Moe],
        &[Full],
    ];
    for names in together {
        let peak = peaks(&setup, names)[0];
        let (measured, theory) = ((whole - peak) as f64, saves(&setup, names));
        println!(
            "| {} | {} | {} | {} | {} | {:.3} |",
            names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
            kib(kept.layer(true, expert_rows, names) as f64),
            kib(peak as f64),
            kib(measured),
            kib(theory),
            measured / theory
        );
    }
}
