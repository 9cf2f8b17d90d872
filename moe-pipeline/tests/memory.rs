//! Peak memory against peaks of activations and against schedules whose order tells it.

mod common;

use common::{Draws, draw_schedule};
use moe_pipeline::generate::{forward_only, one_f_one_b, zb_h1, zb_h2, zb_v};
use moe_pipeline::{
    Costs, Error, Kind, Link, Program, Schedule, StageCost, StageMemory, lower, simulate, validate,
};
use proptest::prelude::*;

fn program(schedule: Schedule) -> Program {
    validate(lower(&schedule).unwrap(), None).unwrap()
}

fn peaks(program: &Program, activation: u64, deferred: u64) -> Vec<u64> {
    let stages = program.schedule().placement().stages() as usize;
    program.peak_memory(&vec![StageMemory { activation, deferred }; stages]).unwrap()
}

/// If input gradients free everything, ZB-H1 keeps what 1F1B does and ZB-H2 goes from 2p−1 down by 2 per rank; if they free
/// nothing, all ranks keep p and 2p−1.
#[test]
fn zero_bubbles_by_what_input_gradients_free() {
    for p in 1..=8_u32 {
        let m = 3 * p;
        let one = program(one_f_one_b(p, m).unwrap());
        let (h1, h2) = (program(zb_h1(p, m).unwrap()), program(zb_h2(p, m).unwrap()));
        assert_eq!(peaks(&h1, 6, 0), peaks(&one, 6, 0));
        assert_eq!(peaks(&h2, 1, 0), (0..p).map(|r| u64::from(2 * (p - r) - 1)).collect::<Vec<_>>());
        assert_eq!(peaks(&h1, 1, 1), vec![u64::from(p); p as usize]);
        assert_eq!(peaks(&h2, 1, 1), vec![u64::from(2 * p - 1); p as usize]);
    }
    let evaluation = program(forward_only(3, 4).unwrap());
    assert_eq!(peaks(&evaluation, 5, 5), [0, 0, 0]);
    let timeline = simulate(&evaluation, &Costs::uniform(3, StageCost::default(), Link::FREE)).unwrap();
    let memory = [StageMemory { activation: 5, deferred: 5 }; 3];
    assert_eq!(evaluation.memory_over_time(&timeline, &memory).unwrap(), vec![Vec::new(); 3]);
}

#[test]
fn stages_count_with_their_own_memory() {
    let zbv = program(zb_v(2, 1).unwrap());
    // Rank 0: 0F0, 3F0, 3I0, 3W0, 0I0, 0W0 of stages that keep 1, 8; rank 1: 1F0, 2F0, 2I0, 1I0 with 2, 4.
    let memory = [1, 2, 4, 8].map(|activation| StageMemory { activation, deferred: activation / 2 });
    assert_eq!(zbv.peak_memory(&memory).unwrap(), [9, 6]);
    assert_eq!(zbv.peak_memory(&memory[..3]), Err(Error::CostCount { what: "stages", expected: 4, got: 3 }));
    let all = [StageMemory { activation: u64::MAX, deferred: 0 }; 4];
    assert!(
        matches!(zbv.peak_memory(&all), Err(Error::MemoryOverflow { at }) if at.action.to_string() == "3F0")
    );
}

/// Of another program, of a part of one, of fewer ranks: levels would fall below nothing.
#[test]
fn a_timeline_of_another_program_is_refused() {
    let timeline = |program: &Program| {
        let stages = program.schedule().placement().stages();
        simulate(program, &Costs::uniform(stages, StageCost::default(), Link::FREE)).unwrap()
    };
    let one = program(one_f_one_b(2, 3).unwrap());
    let levels = |timeline| one.memory_over_time(&timeline, &[StageMemory { activation: 1, deferred: 1 }; 2]);
    let own = timeline(&one);
    assert!(levels(own.clone()).is_ok());
    let mut part = own.clone();
    part.spans[1].remove(0);
    let mut fewer = own.clone();
    fewer.spans.pop();
    assert_eq!(levels(part), Err(Error::OtherTimeline { rank: 1 }));
    assert_eq!(levels(fewer), Err(Error::OtherTimeline { rank: 1 }));
    let others = [zb_h1(2, 3), one_f_one_b(2, 2), one_f_one_b(2, 4), forward_only(2, 3)];
    for other in others {
        assert_eq!(levels(timeline(&program(other.unwrap()))), Err(Error::OtherTimeline { rank: 0 }));
    }
    let more = timeline(&program(one_f_one_b(3, 3).unwrap()));
    assert!(matches!(levels(more), Err(Error::OtherTimeline { .. })));
}

proptest! {
    /// Any schedule: with as much deferred as kept it is the peak of activations, and it is what a look at every moment gives.
    #[test]
    fn peaks_are_those_of_every_moment(p in 1_u32..=6, extra in 0_u32..=4, m in 1_u32..=8, seed: u64) {
        let mut draws = Draws(seed);
        let program = program(draw_schedule(p, extra, m, &mut draws));
        let count: Vec<u64> = program.peak_in_flight().iter().map(|&peak| u64::from(peak)).collect();
        prop_assert_eq!(peaks(&program, 1, 1), count);

        let memory: Vec<StageMemory> = (0..p + extra)
            .map(|_| StageMemory { activation: draws.below(9) as u64, deferred: draws.below(9) as u64 })
            .collect();
        let peak = |rank| {
            let parts: Vec<_> = program.schedule().list(rank).iter().flat_map(|a| a.parts()).collect();
            let kept = |until: usize| -> u64 {
                parts[..=until].iter().filter(|f| f.kind == Kind::Forward).map(|f| {
                    let did = |kind| parts[..=until].iter().any(|a| (a.kind, a.stage, a.microbatch) == (kind, f.stage, f.microbatch));
                    let StageMemory { activation, deferred } = memory[f.stage as usize];
                    match (did(Kind::Backward) || did(Kind::BackwardWeight), did(Kind::BackwardInput)) {
                        (true, _) => 0,
                        (false, true) => deferred,
                        (false, false) => activation,
                    }
                }).sum()
            };
            (0..parts.len()).map(kept).max().unwrap()
        };
        let peaks = program.peak_memory(&memory).unwrap();
        prop_assert_eq!(&peaks, &(0..p).map(peak).collect::<Vec<_>>());

        // Over time: the same peak, moments in order, nothing kept at the end, and never more than when passes began.
        let mut time = || 1.0 + draws.below(16) as f64;
        let stages = (0..p + extra).map(|_| StageCost { forward: time(), backward_input: time(), backward_weight: time() });
        let costs = Costs { stages: stages.collect(), ..Costs::uniform(p + extra, StageCost::default(), Link::FREE) };
        let timeline = simulate(&program, &costs).unwrap();
        let levels = program.memory_over_time(&timeline, &memory).unwrap();
        for (levels, &peak) in levels.iter().zip(&peaks) {
            prop_assert_eq!(levels.iter().map(|level| level.bytes).max(), Some(peak));
            prop_assert!(levels.windows(2).all(|pair| pair[0].from <= pair[1].from));
            prop_assert_eq!(levels.last().map(|level| level.bytes), Some(0));
        }
    }
}
