//! Dispatch and combine without experts: what routing costs beside the matrix products.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moe_comm::{Comms, ThreadRank, ThreadWorld, World};
use moe_dispatch::{
    Dispatcher, DispatcherKind, Error, Grid, NativeFabric, Routing, RoutingOn, Shapes, TokenDispatcher,
};
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Expert, Folding, Mapping};

const HIDDEN: usize = 256;
const NUM_EXPERTS: usize = 8;
const TOP_K: usize = 2;
/// Tokens of all ranks together.
const TOKENS: usize = 2048;

type Routed = (Tensor<f32, Cpu>, RoutingOn<f32, Cpu>);

fn tokens(device: &Cpu, first: usize, n: usize) -> Result<Routed, Error> {
    let x: Vec<f32> = (0..n * HIDDEN).map(|i| (first * HIDDEN + i) as f32).collect();
    let choices = (first * TOP_K..(first + n) * TOP_K).map(|i| ((i * 2_654_435_761) >> 7) % NUM_EXPERTS);
    let experts: Vec<i32> = choices.map(|expert| expert as i32).collect();
    let routing = Routing {
        experts: Tensor::from_slice(device, n, TOP_K, &experts)?,
        weights: Tensor::from_slice(device, n, TOP_K, &vec![0.5; n * TOP_K])?,
        tokens: n,
        top_k: TOP_K,
        shapes: Shapes::Exact,
    };
    Ok((Tensor::from_slice(device, n, HIDDEN, &x)?, routing))
}

fn forward_and_backward(
    fabric: &NativeFabric<'_, f32, Cpu>,
    dispatcher: &TokenDispatcher,
    (x, routing): &Routed,
) -> Result<(), Error> {
    let (batch, state) = dispatcher.dispatch(fabric, x, routing)?;
    let y = dispatcher.combine(fabric, batch.x, &state)?;
    let dout = dispatcher.combine_backward(fabric, &y, &state)?;
    dispatcher.dispatch_backward(fabric, dout, batch.probs, &state)?;
    Ok(())
}

/// The longest time that any rank takes for `iterations`, the worlds' creation excluded.
fn world(mapping: Mapping, kind: DispatcherKind, iterations: u64) -> Duration {
    let folding = Folding::new(mapping).expect("a legal folding");
    let (world_size, share) = (folding.world_size(), TOKENS / folding.world_size());
    let rank = move |rank: ThreadRank| -> Result<Duration, Error> {
        let device = Cpu::new(1);
        let me = World::<Cpu>::rank(&rank);
        let builder = Comms::<Cpu>::builder().expert(Expert::EP).expert(Expert::ETP);
        let comms = builder.expert(Expert::EP | Expert::ETP).build(&rank, &device, &folding)?;
        let fabric = NativeFabric::new(&device, Grid::of(&folding, me)?, &comms)?;
        let dispatcher = TokenDispatcher { kind, num_experts: NUM_EXPERTS };
        let routed = tokens(&device, me * share, share)?;
        forward_and_backward(&fabric, &dispatcher, &routed)?;
        let start = Instant::now();
        for _ in 0..iterations {
            forward_and_backward(&fabric, &dispatcher, &routed)?;
        }
        Ok(start.elapsed())
    };
    let times = ThreadWorld::run(world_size, Duration::from_secs(60), rank).expect("the world runs");
    times.into_iter().max().unwrap_or_default()
}

fn dispatch(c: &mut Criterion) {
    let mut group = c.benchmark_group("dispatch, combine and their gradients");
    group.throughput(Throughput::Elements(TOKENS as u64)).sample_size(10);
    for (world_size, ep, etp) in [(1, 1, 1), (8, 8, 1), (8, 4, 2)] {
        for kind in DispatcherKind::ALL {
            let mapping = Mapping { world_size, ep, etp, ..Mapping::default() };
            let id = BenchmarkId::new(kind.name(), format!("EP{ep} ETP{etp}"));
            group
                .bench_function(id, |b| b.iter_custom(|iterations| world(mapping.clone(), kind, iterations)));
        }
    }
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);
