//! Schedules made for measured costs: never worse than published ones, within memory, on any placement.

mod common;

use common::{Draws, equals_sequential};
use moe_pipeline::generate::{Named, Sizes, for_costs, zb_h1, zb_h2};
use moe_pipeline::{
    Costs, Error, Link, Overlap, Placement, Program, Schedule, StageCost, lower, simulate, validate,
};
use proptest::prelude::*;

fn program(schedule: &Schedule, most: u32) -> Program {
    validate(lower(schedule).unwrap(), Some(most)).unwrap()
}

fn draw_costs(stages: u32, spread: usize, draws: &mut Draws) -> Costs {
    let mut time = |least: f64| least + draws.below(spread) as f64 / 8.0;
    let cost = |_| StageCost { forward: time(1.0), backward_input: time(1.0), backward_weight: time(1.0) };
    let stages: Vec<StageCost> = (0..stages).map(cost).collect();
    let links =
        (1..stages.len()).map(|_| Link { transfer: time(0.0) / 8.0, latency: time(0.0) / 8.0 }).collect();
    Costs { stages, links, overlap: Overlap::Hidden(0.0) }
}

/// On the ground of each, the memory that it takes: at equal costs, where overlaps gain all that they can, and at uneven costs.
#[test]
fn at_least_as_good_as_every_published_one() {
    let mut better = 0;
    let mut draws = Draws(7);
    for &named in Named::ALL {
        let sizes = [(2, 6), (4, 8), (4, 9), (4, 16), (6, 13), (8, 24)].into_iter();
        for (p, m, group) in sizes.flat_map(|(p, m)| [None, Some(p), Some(m)].map(|group| (p, m, group))) {
            let virtual_stages = named.virtual_stages().unwrap_or(2);
            let sizes = Sizes { ranks: p, virtual_stages, microbatches: m, group };
            let Ok(published) = named.generate(sizes) else { continue };
            let stages = published.placement().stages();
            let lowered = validate(lower(&published).unwrap(), None).unwrap();
            let most = lowered.peak_in_flight().iter().copied().max().unwrap();
            let even = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
            let uniform = Costs::uniform(stages, even, Link::FREE);
            let overlapped = Costs { overlap: Overlap::Hidden(1.0), ..uniform.clone() };
            for costs in [uniform, overlapped, draw_costs(stages, 9, &mut draws)] {
                let ours = for_costs(published.placement(), m, &costs, most).unwrap();
                let step = simulate(&program(&ours, most), &costs).unwrap().makespan;
                let theirs = simulate(&lowered, &costs).unwrap().makespan;
                assert!(step <= theirs, "{named} p={p} m={m} group={group:?}: {step} > {theirs}");
                better += u32::from(step < theirs);
            }
        }
    }
    assert!(better > 50, "{better}");
}

/// The step shortens with memory down to ZB-H2's, which no order of one stage per rank beats: the last rank begins (p−1)f late.
#[test]
fn memory_buys_time() {
    let even = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    for (p, m) in [(2, 5), (3, 9), (4, 12), (8, 24)] {
        let costs = Costs::uniform(p, even, Link::FREE);
        let step = |schedule: &Schedule, most| simulate(&program(schedule, most), &costs).unwrap().makespan;
        let ours = |most| step(&for_costs(&Placement::linear(p).unwrap(), m, &costs, most).unwrap(), most);
        assert!(ours(p) <= step(&zb_h1(p, m).unwrap(), p));
        assert!(ours(1) > ours(p));
        assert_eq!(ours(2 * p - 1), step(&zb_h2(p, m).unwrap(), 2 * p - 1));
        assert_eq!(ours(2 * p - 1), f64::from(3 * m + p - 1));
    }
}

#[test]
fn what_cannot_be() {
    let placement = Placement::v_shaped(2).unwrap();
    let even = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    let costs = Costs::uniform(4, even, Link::FREE);
    assert_eq!(
        for_costs(&placement, 3, &costs, 1),
        Err(Error::TooFewActivations { rank: 0, stages: 2, budget: 1 })
    );
    assert_eq!(for_costs(&placement, 0, &costs, 2), Err(Error::Empty { what: "micro-batch" }));
    let few = Costs::uniform(3, even, Link::FREE);
    assert!(matches!(for_costs(&placement, 3, &few, 2), Err(Error::CostCount { expected: 4, got: 3, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Any placement, copies too, any costs, the least memory and more: valid, within memory, and the same sums.
    #[test]
    fn any_placement_and_costs(p in 1_u32..=6, extra in 0_u32..=6, copies in 1_u32..=2, m in 1_u32..=10, more in 0_u32..=6, seed: u64) {
        let mut draws = Draws(seed);
        let mut rank_of: Vec<u32> =
            (0..p + extra).map(|s| if s < p { s } else { draws.below(p as usize) as u32 }).collect();
        for i in (1..rank_of.len()).rev() {
            rank_of.swap(i, draws.below(i + 1));
        }
        if copies == 2 {
            let back: Vec<u32> = rank_of.iter().rev().copied().collect();
            rank_of.extend(back);
        }
        let placement = Placement::with_copies(rank_of, copies).unwrap();
        let most = (0..p).map(|rank| placement.stages_of(rank).len() as u32).max().unwrap() + more;
        let costs = draw_costs(placement.stages(), 40, &mut draws);
        let schedule = for_costs(&placement, m * copies, &costs, most).unwrap();
        let program = program(&schedule, most);
        if draws.below(4) == 0 {
            equals_sequential(&program);
        }
    }
}
