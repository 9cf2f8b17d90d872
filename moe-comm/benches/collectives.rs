//! Collectives between 8 threads, in the time of one operation of all of them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_comm::{Comm, Comms, Reduction, Result, ThreadWorld};
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Attention, Folding, Mapping};

const RANKS: usize = 8;
/// Elements of `f32` on each rank: latency, and bandwidth.
const ELEMENTS: [usize; 3] = [8, 16 << 10, 1 << 20];

type Op = fn(&Comm<'_, Attention, Cpu>, &Tensor<f32, Cpu>) -> Result<Tensor<f32, Cpu>>;

fn all_reduce(comm: &Comm<'_, Attention, Cpu>, x: &Tensor<f32, Cpu>) -> Result<Tensor<f32, Cpu>> {
    comm.all_reduce(x, Reduction::Sum)
}

fn all_to_all(comm: &Comm<'_, Attention, Cpu>, x: &Tensor<f32, Cpu>) -> Result<Tensor<f32, Cpu>> {
    comm.all_to_all_rows_v(x, &[1; RANKS], &[1; RANKS])
}

fn time(op: Op, elements: usize, iterations: u64) -> Duration {
    let times = ThreadWorld::run(RANKS, Duration::from_secs(60), move |world| -> Result<Duration> {
        let mapping = Mapping { world_size: RANKS, tp: RANKS, ..Mapping::default() };
        let Ok(folding) = Folding::new(mapping) else { unreachable!("one axis over all ranks is legal") };
        let device = Cpu::new(1);
        let comms = Comms::builder().attention(Attention::TP).build(&world, &device, &folding)?;
        let comm = comms.group(Attention::TP)?;
        let x = Tensor::zeros(&device, RANKS, elements / RANKS)?;
        comm.barrier()?;
        let begin = Instant::now();
        for _ in 0..iterations {
            black_box(op(&comm, &x)?);
        }
        comm.barrier()?;
        Ok(begin.elapsed())
    });
    times.expect("the ranks do not fail").into_iter().max().unwrap_or_default()
}

fn collectives(c: &mut Criterion) {
    for (name, op) in [("all_reduce", all_reduce as Op), ("all_to_all", all_to_all)] {
        let mut group = c.benchmark_group(name);
        for elements in ELEMENTS {
            group.throughput(Throughput::Bytes((RANKS * elements * size_of::<f32>()) as u64));
            group.bench_function(BenchmarkId::from_parameter(elements), |b| {
                b.iter_custom(|iterations| time(op, elements, iterations));
            });
        }
    }
}

criterion_group!(benches, collectives);
criterion_main!(benches);
