//! Targets: any group of one rank of 1,048,576 in under 1 µs; all foldings of 1,024 ranks in under 50 ms.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use moe_topology::{Attention, Constraints, Expert, Folding, Mapping, Order, View, draw, enumerate, nearest};

fn million() -> Folding {
    let mapping = Mapping { world_size: 1 << 20, tp: 8, cp: 4, pp: 16, ep: 64, etp: 2, ..Mapping::default() }
        .split(Attention::CP_INNER, 2)
        .optimizer_instances(4);
    Folding::new(mapping).expect("a legal mapping")
}

fn groups(c: &mut Criterion) {
    let folding = million();
    let mut bench = c.benchmark_group("one rank of 1,048,576");
    for &(name, axes) in Attention::GROUPS {
        bench.bench_function(format!("attention {name}"), |b| {
            b.iter(|| black_box(&folding).group(black_box(777_777), axes));
        });
    }
    for &(name, axes) in Expert::GROUPS {
        bench.bench_function(format!("expert {name}"), |b| {
            b.iter(|| black_box(&folding).group(black_box(777_777), axes));
        });
    }
    let scattered = Attention::TP_INNER | Attention::CP_OUTER | Attention::DP_INNER | Attention::PP;
    bench.bench_function(format!("attention {scattered}"), |b| {
        b.iter(|| black_box(&folding).group(black_box(777_777), scattered));
    });
    bench.bench_function("position", |b| {
        let group = folding.group(777_777, scattered);
        b.iter(|| black_box(&group).position(black_box(777_777)));
    });
    bench.bench_function("walk ep (64 ranks)", |b| {
        b.iter(|| black_box(&folding).group(black_box(777_777), Expert::EP).iter().sum::<usize>());
    });
    bench.finish();
}

fn searches(c: &mut Criterion) {
    c.bench_function("all foldings of 1,024 ranks", |b| {
        b.iter(|| enumerate(black_box(1024), Order::default(), &Constraints::default()).count());
    });
    let asked = Mapping { world_size: 1024, tp: 3, cp: 5, pp: 7, ep: 9, etp: 11, ..Mapping::default() };
    c.bench_function("nearest to five illegal sizes of 1,024 ranks", |b| {
        b.iter(|| nearest(black_box(&asked), &Constraints::default()));
    });
    let folding = million();
    c.bench_function("svg of 1,048,576 ranks", |b| b.iter(|| draw::svg(black_box(&folding))));
}

criterion_group!(benches, groups, searches);
criterion_main!(benches);
