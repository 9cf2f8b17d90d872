//! A training run on threads, its whole state gathered by logical tensor.

#![allow(dead_code)] // each test file uses a part

pub mod checkpoints;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind;
use moe_dispatch::capacity::DropPolicy;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::{ModelConfig, PipelineLayout, RecomputeModules};
use moe_pipeline::generate::Named;
use moe_topology::{Folding, Mapping};
use moe_train::optim::{Hyper, Moment, sliced_parts};
use moe_train::schedule::{DecayStyle, LrSchedule, LrShape};
use moe_train::trainer::{
    BatchSource, MoeLayerReport, RankTrainer, Sequence, Setup, StepReport, recorded_step,
};

/// Random tokens with uneven loss weights: some targets count nothing, some twice, whole sequences nothing at all.
#[derive(Debug, Clone)]
pub struct RandomBatches {
    pub vocab: u32,
    pub seq_len: usize,
    pub micro_batch: usize,
}

impl BatchSource for RandomBatches {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut state =
            step.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (u as u64 + 1).wrapping_mul(0xD134_2543_DE82_EF95);
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        Ok((0..self.micro_batch)
            .map(|b| {
                let tokens = (0..=self.seq_len).map(|_| next() % self.vocab).collect();
                let mut weight = || [0.0, 1.0, 1.0, 2.0][next() as usize % 4];
                let weights = (0..self.seq_len).map(|_| if u % 3 == 1 && b == 0 { 0.0 } else { weight() });
                Sequence::new(tokens, weights.collect())
            })
            .collect())
    }
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    pub reports: Vec<StepReport>,
    /// Master weight, first and second moment of every logical tensor, row by row.
    pub state: BTreeMap<String, [Vec<f64>; 3]>,
}

/// A tiny model whose sizes little divides.
pub fn tiny_model() -> ModelConfig {
    ModelConfig {
        vocab_size: 37,
        hidden_size: 24,
        intermediate_size: 12,
        moe_intermediate_size: None,
        shared_expert_intermediate_size: None,
        n_shared_experts: None,
        hidden_act: Default::default(),
        mlp_only_layers: Vec::new(),
        decoder_sparse_step: 1,
        first_k_dense_replace: 0,
        use_qk_norm: false,
        qk_norm_scope: Default::default(),
        attention_bias: false,
        mlp_bias: false,
        expert_mlp_bias: false,
        sliding_window: None,
        num_hidden_layers: 3,
        num_attention_heads: 12,
        num_key_value_heads: 6,
        head_dim: Some(4),
        kv_lora_rank: None,
        qk_nope_head_dim: None,
        qk_rope_head_dim: None,
        v_head_dim: None,
        q_lora_rank: None,
        rope_interleave: None,
        num_local_experts: 8,
        num_experts_per_tok: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: None,
        initializer_range: 0.2,
        router_aux_loss_coef: Some(0.03),
        router_aux_losses: Vec::new(),
        router_z_loss_coef: 0.01,
        scoring_func: Default::default(),
        moe_router_dtype: None,
        router_jitter_noise: 0.0,
        moe_router_sinkhorn_iterations: None,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
        n_group: 1,
        topk_group: 1,
        group_score_topk: 2,
        moe_router_enable_expert_bias: false,
        tie_word_embeddings: false,
        pad_token_id: None,
    }
}

/// A setup of `model` under `mapping`.
pub fn setup(model: ModelConfig, mapping: Mapping) -> Setup {
    let pipeline = PipelineLayout::even(model.num_hidden_layers, mapping.pp, 1).unwrap();
    let folding = Folding::new(model.split_tp(mapping)).unwrap();
    Setup {
        model,
        folding,
        pipeline,
        // Of one virtual stage it is 1F1B.
        schedule: Named::Interleaved1F1B,
        micro_batch_group_size: None,
        dispatcher: DispatcherKind::AllToAll,
        capacity: None,
        moe_shared_expert_overlap: false,
        expert_rank_capacity: None,
        recompute: RecomputeModules::default(),
        seed: 5,
        global_batch_size: 16,
        rampup_batch_size: None,
        micro_batch_size: 1,
        sequence_length: 12,
        overlap_grad_reduce: true,
        overlap_param_gather: true,
        optimizer: Hyper {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            moments: Default::default(),
        },
        groups: Vec::new(),
        lr: LrSchedule {
            max: 0.01,
            min: 0.001,
            warmup_steps: 2,
            shape: LrShape::Decay { decay_steps: 10, style: DecayStyle::Cosine },
        },
        clip_grad: 1.0,
        expert_bias_update_rate: 0.0,
        forced_routing: None,
        record_routing: None,
        replay_routing: None,
    }
}

/// Trains `model` for `steps` steps under each folding and holds it to what one rank gives.
pub fn check(
    model: &ModelConfig,
    foldings: impl IntoIterator<Item = (Mapping, DispatcherKind)>,
    steps: u64,
    tweak: impl Fn(&mut Setup),
) {
    let with = |mapping, dispatcher| {
        let mut setup = setup(model.clone(), mapping);
        tweak(&mut setup);
        setup.dispatcher = dispatcher;
        setup
    };
    let one = with(Mapping::default(), DispatcherKind::AllToAll);
    let reference = train_without_ties(one.clone(), steps, random_batches(&one));
    for (mapping, dispatcher) in foldings {
        let what = format!("{mapping}, {dispatcher}, world {}", mapping.world_size);
        let folded = train(with(mapping, dispatcher), steps);
        assert_equal(&folded, &reference, &one, &what);
        assert_same_metrics(&folded, &reference, &what);
    }
}

/// What else is measured, where the reference measures it.
pub fn assert_same_metrics(a: &Outcome, b: &Outcome, what: &str) {
    for (a, b) in a.reports.iter().zip(&b.reports) {
        for (name, a, b) in [
            ("sequence_aux_loss", a.sequence_aux_loss, b.sequence_aux_loss),
            ("global_aux_loss", a.global_aux_loss, b.global_aux_loss),
        ] {
            assert!((a - b).abs() <= 1e-10 * b.abs(), "{what}: {name} {a} and {b}");
        }
        assert_eq!(a.dropped_tokens, b.dropped_tokens, "{what}: dropped_tokens");
        assert_eq!(a.moe_layers.len(), b.moe_layers.len(), "{what}");
        for (a, b) in a.moe_layers.iter().zip(&b.moe_layers) {
            let exact = |l: &MoeLayerReport| (l.layer, l.max_expert_load, l.dropped_tokens);
            assert_eq!(exact(a), exact(b), "{what}");
            let losses = |l: &MoeLayerReport| [l.aux_loss, l.sequence_aux_loss, l.global_aux_loss, l.z_loss];
            for (x, y) in losses(a).into_iter().zip(losses(b)) {
                assert!((x - y).abs() <= 1e-10 * y.abs(), "{what}: {a:?} and {b:?}");
            }
        }
    }
}

pub const DEADLINE: Duration = Duration::from_secs(60);

/// Trains for `steps` steps in f64 on random batches and gathers everything.
pub fn train(setup: Setup, steps: u64) -> Outcome {
    let source = random_batches(&setup);
    train_on(setup, steps, source)
}

fn random_batches(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

/// [`train_on`], and no choice of experts is so near a tie that rounding could turn it: *Equality* of docs/semantics.md.
pub fn train_without_ties(
    setup: Setup,
    steps: u64,
    source: impl BatchSource + Send + Sync + 'static,
) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let doubles = |bytes: Vec<u8>| -> Vec<f64> {
        bytes.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let by_weight = setup.capacity.is_some_and(|capacity| capacity.policy == DropPolicy::Probs);
    let choices_per_unit = setup.micro_batch_size * setup.sequence_length * setup.model.num_experts_per_tok;
    let outcome = train_on(Setup { record_routing: Some(folder.path().to_owned()), ..setup }, steps, source);
    for step in 1..=steps {
        let check = |name: &str, what: &str, margin: f64| {
            assert!(margin > 1e-9, "{name} of step {step}: {what} by {margin:e}; take another seed");
        };
        for (name, margins) in recorded(folder.path(), step, ".margins") {
            check(&name, "a choice stands", doubles(margins).into_iter().fold(f64::INFINITY, f64::min));
        }
        if by_weight {
            let weights = recorded(folder.path(), step, ".weights").into_values().map(doubles);
            for ((name, experts), weights) in
                recorded(folder.path(), step, ".choices").into_iter().zip(weights)
            {
                let experts: Vec<i32> = experts
                    .chunks_exact(4)
                    .map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()))
                    .collect();
                let units = experts.chunks(choices_per_unit).zip(weights.chunks(choices_per_unit));
                let margin = units.map(|(experts, weights)| smallest_gap(experts, weights));
                check(&name, "weights of an expert differ", margin.fold(f64::INFINITY, f64::min));
            }
        }
    }
    outcome
}

/// The smallest difference between two weights of one expert, whichever of them a capacity keeps. Equal weights, as those
/// of single choices that are divided by their sum, are equal under any mapping.
fn smallest_gap(experts: &[i32], weights: &[f64]) -> f64 {
    let mut chosen: Vec<_> = experts.iter().zip(weights).filter(|&(&expert, _)| expert >= 0).collect();
    chosen.sort_by(|a, b| a.0.cmp(b.0).then(a.1.total_cmp(b.1)));
    let neighbours = chosen.windows(2).filter(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1);
    neighbours.map(|pair| pair[1].1 - pair[0].1).fold(f64::INFINITY, f64::min)
}

/// The matrices of a recorded step whose names end in `suffix`.
pub fn recorded(root: &Path, step: u64, suffix: &str) -> BTreeMap<String, Vec<u8>> {
    let matrices = checkpoints::tensors(&recorded_step(root, step)).into_iter();
    matrices.map(|((name, _), bytes)| (name, bytes)).filter(|(name, _)| name.ends_with(suffix)).collect()
}

/// Trains for `steps` steps in f64 and gathers everything.
pub fn train_on(setup: Setup, steps: u64, source: impl BatchSource + Send + Sync + 'static) -> Outcome {
    train_in::<f64>(setup, steps, source)
}

/// Trains for `steps` steps in `T` and gathers everything.
pub fn train_in<T: Float>(
    setup: Setup,
    steps: u64,
    source: impl BatchSource + Send + Sync + 'static,
) -> Outcome
where
    Cpu: Backend<T>,
{
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<T, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let mut reports = Vec::new();
        for step in 1..=steps {
            reports.push(trainer.step(step, &source)?);
        }
        Ok::<_, moe_train::Error>((reports, pieces(&trainer)?))
    })
    .unwrap_or_else(|error| panic!("{error}"));

    gather(ranks)
}

/// Puts together what the ranks of a world hold, and checks that they report the same and hold every element once.
pub fn gather(ranks: impl IntoIterator<Item = (Vec<StepReport>, Vec<Piece>)>) -> Outcome {
    let mut reports = None;
    let mut state: BTreeMap<String, [Vec<f64>; 3]> = BTreeMap::new();
    for (own, pieces) in ranks {
        match &reports {
            None => reports = Some(own),
            Some(first) => assert_eq!(*first, own, "ranks report different measurements"),
        }
        for piece in pieces {
            let tensor =
                state.entry(piece.name).or_insert_with(|| std::array::from_fn(|_| vec![f64::NAN; piece.len]));
            for (whole, values) in tensor.iter_mut().zip(&piece.values) {
                for (&at, &value) in piece.at.iter().zip(values) {
                    assert!(whole[at].is_nan(), "an element is held twice");
                    whole[at] = value;
                }
            }
        }
    }
    for (name, tensor) in &state {
        assert!(tensor.iter().flatten().all(|x| !x.is_nan()), "{name} is not covered");
    }
    Outcome { reports: reports.unwrap(), state }
}

/// What a rank holds of a logical tensor.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Piece {
    name: String,
    len: usize,
    at: Vec<usize>,
    values: [Vec<f64>; 3],
}

/// What `trainer`'s rank holds; every element of `T` is exact in f64.
pub fn pieces<T: Float, D: Backend<T>>(trainer: &RankTrainer<T, D>) -> moe_train::Result<Vec<Piece>> {
    let cx = trainer.cx();
    let mut pieces = Vec::new();
    for (index, bucket) in cx.params.buckets().iter().enumerate() {
        let kept = |moment| trainer.optimizer().kept(&cx.params, index, moment)?.to_f64(&cx.device);
        let [master, m, v] = Moment::ALL.map(kept);
        let slices = [master?, m?, v?];
        for (part, range) in sliced_parts(bucket).filter(|(part, _)| part.counts) {
            let local = range.start - bucket.slice.start..range.end - bucket.slice.start;
            pieces.push(Piece {
                name: part.name.clone(),
                len: part.dims[0] * part.dims[1],
                at: range.map(|at| part.logical_index(at - part.offset)).collect(),
                values: slices.each_ref().map(|slice| slice[local.clone()].to_vec()),
            });
        }
    }
    // A buffer has no moments.
    for (id, buffer) in cx.params.layout().buffers().filter(|(_, buffer)| buffer.counts) {
        let (values, none) = (cx.params.buffer(id).to_f64(&cx.device)?, vec![0.0; buffer.len]);
        let (name, at) = (buffer.name.clone(), (0..buffer.len).collect());
        pieces.push(Piece { name, len: buffer.len, at, values: [values, none.clone(), none] });
    }
    Ok(pieces)
}

/// *Equality* of docs/semantics.md: per tensor, `max|a−b| ≤ 1e-10·max|b| + floor`, where the floor is 1e-16·‖g‖ for the first
/// moment, its square for the second, and t·lr·φ/ε for the weights.
pub fn assert_equal(a: &Outcome, b: &Outcome, setup: &Setup, what: &str) {
    assert_eq!(a.reports.len(), b.reports.len());
    for (x, y) in a.reports.iter().zip(&b.reports) {
        let close = |name: &str, x: f64, y: f64| {
            assert!(
                (x - y).abs() <= 1e-10 * y.abs(),
                "{what}: {name} of step {}: {x} and {y}",
                a.reports[0].step
            );
        };
        close("loss", x.loss.unwrap(), y.loss.unwrap());
        close("total_loss", x.total_loss.unwrap(), y.total_loss.unwrap());
        close("grad_norm", x.grad_norm, y.grad_norm);
        close("aux_loss", x.aux_loss, y.aux_loss);
        close("z_loss", x.z_loss, y.z_loss);
        assert_eq!(x.expert_load, y.expert_load, "{what}: expert load");
        assert_eq!(x.dropped_tokens, y.dropped_tokens, "{what}: dropped tokens");
        close("lr", x.lr, y.lr);
        assert_eq!((x.step, x.updated), (y.step, y.updated));
    }
    assert!(a.state.keys().eq(b.state.keys()), "{what}: other tensors");
    let phi = 1e-16 * b.reports.iter().map(|r| r.grad_norm).fold(0.0, f64::max);
    let steps = b.reports.len() as f64;
    let floors = [steps * setup.lr.max * phi / setup.optimizer.eps, phi, phi * phi];
    for (name, b) in &b.state {
        for (((x, y), floor), moment) in a.state[name].iter().zip(b).zip(floors).zip(Moment::ALL) {
            let largest = y.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let worst = x.iter().zip(y).fold(0.0, |m: f64, (x, y)| m.max((x - y).abs()));
            assert!(
                worst <= 1e-10 * largest + floor,
                "{what}: {} of {name} differs by {worst:e}, largest {largest:e}",
                moment.name()
            );
        }
    }
}

/// Every float of a report, as bits.
fn bits(report: &StepReport) -> Vec<u64> {
    let StepReport { loss, total_loss, grad_norm, lr, aux_loss, z_loss, expert_load, .. } = report;
    let floats = [loss.unwrap(), total_loss.unwrap(), *grad_norm, *lr, *aux_loss, *z_loss];
    floats.iter().chain(expert_load.iter().flatten()).map(|x| x.to_bits()).collect()
}

/// Reports and state are the same bit for bit.
pub fn assert_same_bits(a: &Outcome, b: &Outcome, what: &str) {
    assert_eq!(a.reports.len(), b.reports.len(), "{what}");
    for (x, y) in a.reports.iter().zip(&b.reports) {
        assert_eq!((x, bits(x)), (y, bits(y)), "{what}: step {}", x.step);
    }
    assert!(a.state.keys().eq(b.state.keys()), "{what}: other tensors");
    for (name, tensor) in &a.state {
        let bits = |state: &[Vec<f64>; 3]| state.each_ref().map(|t| t.iter().map(|x| x.to_bits()).collect());
        let (x, y): ([Vec<u64>; 3], _) = (bits(tensor), bits(&b.state[name]));
        assert!(x == y, "{what}: {name}");
    }
}
