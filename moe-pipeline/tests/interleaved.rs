//! Interleaved 1F1B: torch's orders, closed forms, what it refuses, and the executor.

mod common;

use common::{equals_sequential, equals_sequential_with};
use moe_pipeline::generate::{forward_only, forward_only_over, interleaved_1f1b, one_f_one_b};
use moe_pipeline::{
    Costs, Error, Kind, Link, Placement, Program, Schedule, StageCost, lower, simulate, validate,
};
use proptest::prelude::*;

fn program(schedule: &Schedule) -> Program {
    validate(lower(schedule).unwrap(), None).unwrap()
}

fn evaluation(p: u32, v: u32, m: u32) -> Schedule {
    forward_only_over(&Placement::looped(p, v).unwrap(), m).unwrap()
}

/// Megatron's `get_schedule_table` for 5 micro-batches in groups of 3: chunk 0 of 0, 1, 2, chunk 1 of them, then 3, 4.
#[test]
fn a_last_group_that_is_smaller() {
    let schedule = interleaved_1f1b(2, 2, 5, Some(3)).unwrap();
    let pass = |rank, kind| {
        let list: Vec<String> =
            schedule.list(rank).iter().filter(|a| a.kind == kind).map(ToString::to_string).collect();
        list.join(",")
    };
    assert_eq!(pass(0, Kind::Forward), "0F0,0F1,0F2,2F0,2F1,2F2,0F3,0F4,2F3,2F4");
    assert_eq!(pass(1, Kind::Backward), "3B0,3B1,3B2,1B0,1B1,1B2,3B3,3B4,1B3,1B4");
    // (v−1)·group passes ahead on the last rank, two more on the one before.
    let first = |rank: u32| schedule.list(rank).iter().position(|a| a.kind == Kind::Backward).unwrap();
    assert_eq!((first(0), first(1)), (6, 4));
}

#[test]
fn one_virtual_stage_is_one_f_one_b() {
    for (p, m, group) in [(1, 1, None), (4, 2, None), (3, 7, Some(1)), (4, 8, Some(100))] {
        assert_eq!(interleaved_1f1b(p, 1, m, group), one_f_one_b(p, m));
        assert_eq!(evaluation(p, 1, m), forward_only(p, m).unwrap());
    }
}

#[test]
fn other_sizes_are_refused_with_the_nearest() {
    let text = |p, v, m, group| interleaved_1f1b(p, v, m, group).unwrap_err().to_string();
    let rule = "groups have at least 4 (the ranks), the last one too, and at most all micro-batches (one group of all may \
                have fewer, but leaves ranks without work)";
    assert_eq!(
        text(4, 2, 2, None),
        format!(
            "2 virtual stages on 4 ranks cannot take 2 micro-batches in groups of 4: {rule}; the nearest numbers of \
             micro-batches: 4"
        )
    );
    assert_eq!(
        text(4, 3, 9, None),
        format!(
            "3 virtual stages on 4 ranks cannot take 9 micro-batches in groups of 4: {rule}; the nearest numbers of \
             micro-batches: 8, 12; or one group of 9"
        )
    );
    assert!(
        text(4, 2, 13, Some(6)).ends_with("the nearest numbers of micro-batches: 12, 16; or one group of 13")
    );
    assert!(text(4, 2, 8, Some(3)).ends_with("the nearest group is 4"));
    assert!(text(2, 2, 8, Some(0)).ends_with("the nearest group is 2"));
    assert!(text(4, 2, 2, Some(1)).ends_with("the nearest are groups of 4, of 4 micro-batches or more"));
    // Whoever makes such an error can show it.
    let nothing = Error::Group { ranks: 0, virtual_stages: 2, microbatches: 3, group: 0 };
    assert!(nothing.to_string().contains("in groups of 0"));
    // One group of all is legal however few they are.
    assert!(interleaved_1f1b(4, 2, 2, Some(2)).is_ok());
    let nothing = |what| Error::Empty { what };
    assert_eq!(interleaved_1f1b(0, 2, 4, None), Err(nothing("stage")));
    assert_eq!(interleaved_1f1b(2, 0, 4, None), Err(nothing("stage")));
    assert_eq!(interleaved_1f1b(2, 2, 0, None), Err(nothing("micro-batch")));
    assert_eq!(Placement::looped(1 << 16, 1 << 15), Err(Error::TooManyStages { stages: 1 << 31 }));
    assert_eq!(Placement::looped(1 << 31, 2), Err(Error::TooManyStages { stages: 1 << 32 }));
}

/// Megatron's rule of groups; and all that it accepts runs, and keeps what the closed form says.
#[test]
fn whatever_is_accepted_is_valid() {
    for p in 1..=5 {
        for v in 2..=4 {
            for m in 1..=12 {
                for group in 1..=m {
                    let rest = m % group;
                    let legal = group == m || group >= p && (rest == 0 || rest >= p);
                    let schedule = interleaved_1f1b(p, v, m, Some(group));
                    assert_eq!(schedule.is_ok(), legal, "p={p} v={v} m={m} group={group}");
                    let Ok(schedule) = schedule else { continue };
                    let peak = |r: u32| (2 * (p - r - 1) + (v - 1) * group + 1).min(m * v);
                    let expected: Vec<u32> = (0..p).map(peak).collect();
                    assert_eq!(
                        program(&schedule).peak_in_flight(),
                        expected,
                        "p={p} v={v} m={m} group={group}"
                    );
                }
                let evaluation = program(&evaluation(p, v, m));
                assert_eq!(evaluation.peak_in_flight(), vec![0; p as usize]);
            }
        }
    }
}

/// Section 2.2 of arXiv 2104.04473: the time that 1F1B idles, by v; and p·v + p − 1 − 2r activations of a stage, unless there are
/// fewer. For all sizes up to 16 ranks and 64 micro-batches.
#[test]
fn idle_and_peak_are_the_closed_forms() {
    for p in 1..=16 {
        for v in 2..=4 {
            for m in (p..=64).step_by(p as usize) {
                let program = program(&interleaved_1f1b(p, v, m, None).unwrap());
                for (f, i, w) in [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75), (2.0, 0.5, 0.25), (0.5, 3.0, 4.0)] {
                    let cost = StageCost { forward: f, backward_input: i, backward_weight: w };
                    let timeline = simulate(&program, &Costs::uniform(p * v, cost, Link::FREE)).unwrap();
                    let idle = f64::from(p - 1) * (f + i + w);
                    let work = f64::from(m * v) * (f + i + w);
                    assert_eq!(timeline.makespan, work + idle, "p={p} v={v} m={m}");
                    for rank in &timeline.idle {
                        assert_eq!(rank.total(), idle, "p={p} v={v} m={m}");
                    }
                }
                let peak: Vec<u32> = (0..p).map(|r| (p * v + p - 1 - 2 * r).min(m * v)).collect();
                assert_eq!(program.peak_in_flight(), peak, "p={p} v={v} m={m}");
            }
        }
    }
}

#[test]
fn sums_are_those_of_sequential_execution_bit_for_bit() {
    for (p, v, m, group) in [
        (1, 3, 2, None),
        (2, 2, 2, None),
        (2, 3, 6, None),
        (2, 2, 5, Some(3)),
        (3, 2, 6, None),
        (3, 4, 8, Some(5)),
        (4, 2, 6, Some(6)),
        (4, 3, 8, None),
    ] {
        equals_sequential(&program(&interleaved_1f1b(p, v, m, group).unwrap()));
    }
    for (p, v, m) in [(2, 2, 1), (2, 3, 3), (3, 2, 7), (4, 3, 5)] {
        equals_sequential(&program(&evaluation(p, v, m)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Over rendezvous and buffered transports between threads, with stages that take unequal time.
    #[test]
    fn any_sizes_give_the_same_bits(p in 1_u32..=5, v in 2_u32..=4, extra in 0_u32..=3, groups in 1_u32..=3, rest: u32, seed: u64) {
        let group = p + extra;
        let rest = Some(p + rest % (extra + 1)).filter(|rest| *rest < group).unwrap_or(0);
        let schedule = interleaved_1f1b(p, v, groups * group + rest, Some(group)).unwrap();
        equals_sequential_with(&program(&schedule), Some(seed));
    }
}
