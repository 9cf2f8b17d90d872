//! What an MoE layer costs, forward and backward, as tokens and experts grow: linear in tokens, and at a fixed number of
//! tokens the same for any number of experts but for one pass over their weights and gradients.
//!
//! Experts get equally many rows (forced balance), at least 256 each. Norm, router, dispatch and combine are included. One
//! thread computes, and its time on the processor is taken where the system tells it (Linux), so that other work on the
//! machine shows less.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use moe_comm::{ThreadRank, ThreadWorld};
use moe_kernels::family::{Elementwise, Reduce};
use moe_kernels::{Cpu, Tensor};
use moe_model::axes::communicators;
use moe_model::forced::ForcedRouting;
use moe_model::moe::MoeMlp;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{Cx, Execution, Layer, MicroBatch, Mode, ModelConfig, MoeStats, Objective, RopeTable};
use moe_topology::{Folding, Mapping};

const HIDDEN: usize = 128;
const INNER: usize = 256;
const TOP_K: usize = 8;
const TOKENS: usize = 8192;
const ROWS: usize = TOKENS * TOP_K;

fn model(experts: usize) -> ModelConfig {
    serde_json::from_value(serde_json::json!({
        "vocab_size": 32, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": experts,
        "num_experts_per_tok": TOP_K
    }))
    .expect("a model")
}

/// Time of this thread on the processor, or of the clock where the system doesn't tell.
struct Timer {
    start: Instant,
    on_cpu: Option<Duration>,
}

impl Timer {
    fn on_cpu() -> Option<Duration> {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        Some(Duration::from_nanos(stat.split(' ').next()?.parse().ok()?))
    }

    fn start() -> Self {
        Timer { start: Instant::now(), on_cpu: Timer::on_cpu() }
    }

    fn elapsed(self) -> Duration {
        match (self.on_cpu, Timer::on_cpu()) {
            (Some(then), Some(now)) => now - then,
            _ => self.start.elapsed(),
        }
    }
}

/// Time of `iterations` forward and backward passes of `tokens` tokens.
fn layer(world: &ThreadRank, tokens: usize, experts: usize, iterations: u64) -> moe_model::Result<Duration> {
    let (device, folding) = (Cpu::new(1), Folding::new(Mapping::default())?);
    let mut layout = ParamLayoutBuilder::new(&folding, 0);
    let mlp = MoeMlp::new(&mut layout, &model(experts), Execution::default(), 0, 0)?;
    let params = ParamStore::<f32, Cpu>::new(layout.build(), 1, &device)?;
    let comms = communicators::<Cpu>().build(world, &device, &folding)?;
    let rope = RopeTable::of(&device, &model(experts), 1)?;
    let objective = Objective { micro_batches: 1, sequences: 1, tokens };
    let mut cx = Cx::new(device.clone(), comms, params, rope, objective);
    cx.mode = Mode::Train { seed: 0, step: 1 };
    cx.forced_routing = Some(ForcedRouting::Balanced);
    let (ids, positions) = (vec![0; tokens], Vec::from_iter(0..tokens as i32));
    cx.batches = vec![MicroBatch::new(&device, 1, &ids, &positions, &ids, &vec![1.0; tokens], 1.0)?];
    cx.stats.moe = MoeStats::new(&device, vec![0], experts)?;
    cx.params.zero_grads(false);

    let values: Vec<f32> = (0..tokens * HIDDEN).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
    let x = Tensor::from_slice(&device, tokens, HIDDEN, &values)?;
    let pass = |cx: &mut Cx<f32, Cpu>| {
        let (y, saved) = mlp.forward(0, x.clone().into(), cx)?;
        let (_, deferred) = mlp.backward_input(0, y.sum(&cx.device)?, saved, cx)?;
        mlp.backward_weight(0, deferred, cx)
    };
    pass(&mut cx)?;
    let rows = (tokens * TOP_K / experts) as i64;
    let seen = cx.stats.moe.read(&device)?;
    assert!(seen[&0].expert_counts.iter().all(|&count| count == rows) && rows >= 256);
    let start = Timer::start();
    for _ in 0..iterations {
        pass(&mut cx)?;
    }
    Ok(start.elapsed())
}

/// Time of `iterations` times what no order of work can spare: weights are read forward and backward, gradients read and
/// written.
fn weights_and_gradients(experts: usize, iterations: u64) -> moe_kernels::Result<Duration> {
    let device = Cpu::new(1);
    let weights = Tensor::<f32, Cpu>::zeros(&device, 3 * experts * INNER, HIDDEN)?;
    let mut gradients = Tensor::<f32, Cpu>::zeros(&device, 3 * experts * INNER, HIDDEN)?;
    let start = Timer::start();
    for _ in 0..iterations {
        let mut sums = Tensor::<f32, Cpu>::uninit(&device, 1, HIDDEN)?;
        Reduce::<f32>::column_sums(&device, sums.view_mut()?, weights.view())?;
        Elementwise::<f32>::add_assign(&device, gradients.view_mut()?, weights.view())?;
    }
    Ok(start.elapsed())
}

fn world(tokens: usize, experts: usize, iterations: u64) -> Duration {
    let rank = move |rank: ThreadRank| layer(&rank, tokens, experts, iterations);
    ThreadWorld::run(1, Duration::from_secs(600), rank).expect("the world runs")[0]
}

fn moe_layer(c: &mut Criterion) {
    let mut group = c.benchmark_group("MoE layer by experts");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).throughput(Throughput::Elements(ROWS as u64));
    for experts in [8, 16, 32, 64, 128, 256] {
        group.bench_function(BenchmarkId::from_parameter(experts), |b| {
            b.iter_custom(|iterations| world(TOKENS, experts, iterations))
        });
    }
    group.finish();

    // Few long samples: the system counts a thread's time only every few milliseconds.
    let mut group = c.benchmark_group("a pass over weights and gradients by experts");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for experts in [8, 256] {
        group.bench_function(BenchmarkId::from_parameter(experts), |b| {
            b.iter_custom(|iterations| weights_and_gradients(experts, iterations).expect("the pass"))
        });
    }
    group.finish();

    let mut group = c.benchmark_group("MoE layer of 32 experts by tokens");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for tokens in [1024, 2048, 4096, 8192] {
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter_custom(|iterations| world(tokens, 32, iterations))
        });
    }
    group.finish();
}

criterion_group!(benches, moe_layer);
criterion_main!(benches);
