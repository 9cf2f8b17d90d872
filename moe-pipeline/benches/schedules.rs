//! Cost of a schedule's life, and of the executor, per action: `cargo bench -p moe-pipeline`.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_pipeline::transport::buffered;
use moe_pipeline::{Costs, Link, Stage, StageCost, execute, generate, lower, simulate, validate};

/// 1F1B at three sizes: the time per action stays the same.
fn schedules(c: &mut Criterion) {
    let mut group = c.benchmark_group("1f1b");
    group.sample_size(10);
    let cost = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    for (p, m) in [(16, 256), (32, 512), (64, 1024)] {
        let lowered = lower(&generate::one_f_one_b(p, m).unwrap()).unwrap();
        let size = format!("p{p}_m{m}");
        group.throughput(Throughput::Elements(lowered.actions().count() as u64));
        group.bench_function(BenchmarkId::new("generate_and_lower", &size), |b| {
            b.iter(|| lower(&generate::one_f_one_b(black_box(p), black_box(m)).unwrap()).unwrap());
        });
        group.bench_function(BenchmarkId::new("validate", &size), |b| {
            b.iter_with_setup(|| lowered.clone(), |lowered| validate(lowered, None).unwrap());
        });
        let program = validate(lowered, None).unwrap();
        let costs = Costs::uniform(p, cost, Link { transfer: 0.1, latency: 0.05 });
        group.bench_function(BenchmarkId::new("simulate", &size), |b| {
            b.iter(|| simulate(black_box(&program), black_box(&costs)).unwrap());
        });
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

    fn forward(&self, _: u32, _: Option<()>, _: &mut ()) -> Result<(Option<()>, ()), Infallible> {
        Ok(((!self.1).then_some(()), ()))
    }

    fn backward_input(
        &self,
        _: u32,
        _: Option<()>,
        _: (),
        _: &mut (),
    ) -> Result<(Option<()>, ()), Infallible> {
        Ok(((!self.0).then_some(()), ()))
    }

    fn backward_weight(&self, _: u32, _: (), _: &mut ()) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The executor's own time on two threads, messages included.
fn executor(c: &mut Criterion) {
    let program = validate(lower(&generate::one_f_one_b(2, 4096).unwrap()).unwrap(), None).unwrap();
    let mut group = c.benchmark_group("execute");
    group.sample_size(10);
    group.throughput(Throughput::Elements(program.schedule().list(0).len() as u64));
    group.bench_function("buffered_p2_m4096", |b| {
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
    group.finish();
}

criterion_group!(benches, schedules, executor);
criterion_main!(benches);
