//! Cost of a schedule's life, and of the executor, per action: `cargo bench -p moe-pipeline`.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_pipeline::transport::buffered;
use moe_pipeline::weave::{LayerCost, weave};
use moe_pipeline::{
    Costs, Link, Result, Schedule, Stage, StageCost, execute, generate, lower, simulate, validate,
};

/// The life of a schedule at three sizes each: the time per action stays the same.
fn schedules(c: &mut Criterion) {
    life(c, "1f1b", generate::one_f_one_b);
    life(c, "interleaved_v4", |p, m| generate::interleaved_1f1b(p, 4, m, None));
    life(c, "v_half", generate::v_half);
    life(c, "dual_pipe_v", generate::dual_pipe_v);
}

fn life(c: &mut Criterion, name: &str, generate: impl Fn(u32, u32) -> Result<Schedule>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    let cost = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    for (p, m) in [(16, 256), (32, 512), (64, 1024)] {
        let schedule = generate(p, m).unwrap();
        let lowered = lower(&schedule).unwrap();
        let size = format!("p{p}_m{m}");
        group.throughput(Throughput::Elements(lowered.actions().count() as u64));
        group.bench_function(BenchmarkId::new("generate", &size), |b| {
            b.iter(|| generate(black_box(p), black_box(m)).unwrap());
        });
        group.bench_function(BenchmarkId::new("lower", &size), |b| {
            b.iter(|| lower(black_box(&schedule)).unwrap());
        });
        group.bench_function(BenchmarkId::new("validate", &size), |b| {
            b.iter_with_setup(|| lowered.clone(), |lowered| validate(lowered, None).unwrap());
        });
        let program = validate(lowered, None).unwrap();
        let costs =
            Costs::uniform(schedule.placement().stages(), cost, Link { transfer: 0.1, latency: 0.05 });
        group.bench_function(BenchmarkId::new("simulate", &size), |b| {
            b.iter(|| simulate(black_box(&program), black_box(&costs)).unwrap());
        });
    }
    group.finish();
}

/// The order of an overlap, by layers of each pass: even ones, ones whose lanes have about as much to do, and ones that no narrow search
/// settles.
fn weaving(c: &mut Criterion) {
    let mut group = c.benchmark_group("weave");
    group.sample_size(10);
    let cost = |time| StageCost { forward: time, backward_input: 1.1 * time, backward_weight: 0.9 * time };
    let cases = [("even", 1.0, 1.0, 1.0), ("full", 0.7, 1.9, 1.8), ("hard", 0.7, 1.9, 0.8)];
    for (name, attention, experts, all_to_all) in cases {
        let layer = LayerCost::Moe { attention: cost(attention), experts: cost(experts), all_to_all };
        for layers in [2, 8, 32] {
            let layers = vec![layer; layers];
            group.bench_function(BenchmarkId::new(name, layers.len()), |b| {
                b.iter(|| weave(black_box(&layers), black_box(&layers)).unwrap());
            });
        }
    }
    group.finish();
}

/// A stage that does nothing.
struct Nothing(bool, bool);

impl Stage for Nothing {
    type Cx = ();
    type Act = ();
    type Saved = ();
    type Deferred = ();
    type Error = Infallible;

    fn forward(
        &self,
        _: u32,
        _: Option<()>,
        _: &mut (),
    ) -> std::result::Result<(Option<()>, ()), Infallible> {
        Ok(((!self.1).then_some(()), ()))
    }

    fn backward_input(
        &self,
        _: u32,
        _: Option<()>,
        _: (),
        _: &mut (),
    ) -> std::result::Result<(Option<()>, ()), Infallible> {
        Ok(((!self.0).then_some(()), ()))
    }

    fn backward_weight(&self, _: u32, _: (), _: &mut ()) -> std::result::Result<(), Infallible> {
        Ok(())
    }
}

/// The executor's time per action on two threads, messages included, with stages that do nothing. Under GPipe messages have arrived when
/// they are waited for; under 1F1B each thread waits for the other all the time, and how soon it is woken is the machine's affair.
fn executor(c: &mut Criterion) {
    let mut group = c.benchmark_group("execute");
    group.sample_size(10);
    for (name, schedule) in [("gpipe", generate::gpipe(2, 4096)), ("1f1b", generate::one_f_one_b(2, 4096))] {
        let program = validate(lower(&schedule.unwrap()).unwrap(), None).unwrap();
        group.throughput(Throughput::Elements(program.schedule().list(0).len() as u64));
        group.bench_function(BenchmarkId::new(name, "p2_m4096"), |b| {
            b.iter(|| {
                std::thread::scope(|scope| {
                    for (rank, mut channels) in (0..).zip(buffered(2, Duration::from_secs(60))) {
                        let program = &program;
                        scope.spawn(move || {
                            let stages = [Nothing(rank == 0, rank == 1)];
                            execute(program, rank, &stages, &mut channels, &mut ()).unwrap();
                        });
                    }
                });
            });
        });
    }
    group.finish();
}

criterion_group!(benches, schedules, weaving, executor);
criterion_main!(benches);
