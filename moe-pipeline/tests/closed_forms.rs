//! The simulator against published formulas, for all sizes up to 16 ranks and 64 micro-batches. Links are free.
//! Idle times hold for a step that all ranks begin and end together.

use moe_pipeline::generate::{
    breadth_first, dual_pipe, dual_pipe_v, gpipe, interleaved_1f1b, interleaved_zero_bubble, one_f_one_b,
    overlapped_1f1b, v_half, v_min, zb_h1, zb_h2, zb_v,
};
use moe_pipeline::{
    Costs, Link, Overlap, Program, Result, Schedule, StageCost, Timeline, lower, simulate, validate,
};

/// Times that binary floating point adds exactly.
const EVEN: [f64; 3] = [1.0, 1.0, 1.0];
const UNEVEN: [f64; 3] = [1.0, 1.25, 0.75];

/// Weight gradients no longer than the other passes.
const SHORT_WEIGHTS: [[f64; 3]; 6] =
    [EVEN, UNEVEN, [2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [3.0, 1.0, 0.5], [1.0, 4.0, 0.25]];

/// Input gradients no longer than the two others together.
const SHORT_INPUTS: [[f64; 3]; 6] =
    [EVEN, UNEVEN, [2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [3.0, 1.0, 0.5], [1.0, 0.75, 1.25]];

fn program(schedule: Result<Schedule>) -> Program {
    validate(lower(&schedule.unwrap()).unwrap(), None).unwrap()
}

fn run(program: &Program, [forward, backward_input, backward_weight]: [f64; 3], overlap: f64) -> Timeline {
    let cost = StageCost { forward, backward_input, backward_weight };
    let uniform = Costs::uniform(program.schedule().placement().stages(), cost, Link::FREE);
    simulate(program, &Costs { overlap: Overlap::Hidden(overlap), ..uniform }).unwrap()
}

fn sizes() -> impl Iterator<Item = (u32, u32)> {
    (1..=16).flat_map(|p| (1..=64).map(move |m| (p, m)))
}

/// Every rank idles so long.
fn all_idle(timeline: &Timeline, expected: f64, case: &str) {
    for idle in &timeline.idle {
        assert_eq!(idle.total(), expected, "{case}");
    }
}

/// Idle time between a rank's first and last action, the longest of all ranks.
fn inside(timeline: &Timeline) -> f64 {
    let of_rank = |spans: &Vec<moe_pipeline::Span>| {
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        spans.last().unwrap().end - spans[0].start - busy
    };
    timeline.spans.iter().map(of_rank).fold(0.0, f64::max)
}

#[test]
fn gpipe_and_one_f_one_b() {
    for (p, m) in sizes() {
        for [f, i, w] in [EVEN, UNEVEN] {
            let case = format!("p={p} m={m}");
            let idle = f64::from(p - 1) * (f + i + w);
            let all = program(gpipe(p, m));
            all_idle(&run(&all, [f, i, w], 0.0), idle, &case);
            assert_eq!(all.peak_in_flight(), vec![m; p as usize], "{case}");
            let few = program(one_f_one_b(p, m));
            all_idle(&run(&few, [f, i, w], 0.0), idle, &case);
            assert_eq!(few.peak_in_flight(), (0..p).map(|r| m.min(p - r)).collect::<Vec<_>>(), "{case}");
        }
    }
}

/// The first stages of the second round begin when both the first micro-batch has come round and the last has left: ranks idle as
/// under GPipe, and in each further round for the micro-batches that are too few to fill the ranks.
#[test]
fn breadth_first_rounds() {
    for (p, m) in sizes() {
        for v in 2..=3 {
            let program = program(breadth_first(p, v, m));
            let case = format!("p={p} v={v} m={m}");
            for [f, i, w] in [EVEN, UNEVEN] {
                let waits = p - 1 + (v - 1) * p.saturating_sub(m);
                all_idle(&run(&program, [f, i, w], 0.0), f64::from(waits) * (f + i + w), &case);
            }
            assert_eq!(program.peak_in_flight(), vec![m * v; p as usize], "{case}");
        }
    }
}

/// (p−1)(f+i−w) and p activations from p micro-batches on. With fewer there are fewer weight gradients to fill gaps with.
#[test]
fn zero_bubble_h1() {
    for (p, m) in sizes() {
        let program = program(zb_h1(p, m));
        let case = format!("p={p} m={m}");
        for [f, i, w] in SHORT_WEIGHTS {
            let idle = f64::from(p - 1) * (f + i) - f64::from(p.min(m) - 1) * w;
            all_idle(&run(&program, [f, i, w], 0.0), idle, &case);
        }
        assert_eq!(program.peak_in_flight(), vec![p.min(m); p as usize], "{case}");
    }
}

/// The same idle time over stages 1/v as long, and p·v activations of a stage.
#[test]
fn interleaved_zero_bubbles() {
    for (p, m) in sizes().filter(|(p, m)| m.is_multiple_of(*p)) {
        for v in 2..=3 {
            let program = program(interleaved_zero_bubble(p, v, m, None));
            let case = format!("p={p} v={v} m={m}");
            for [f, i, w] in SHORT_WEIGHTS {
                all_idle(&run(&program, [f, i, w], 0.0), f64::from(p - 1) * (f + i - w), &case);
            }
            assert_eq!(program.peak_in_flight(), vec![p * v; p as usize], "{case}");
        }
    }
}

/// From 2p−1 micro-batches on: (p−1)f, none of it between a rank's first and last action at equal costs; 2p−1 activations.
#[test]
fn zero_bubble_h2() {
    for (p, m) in sizes().filter(|(p, m)| *m >= 2 * p - 1) {
        let program = program(zb_h2(p, m));
        let case = format!("p={p} m={m}");
        for [f, i, w] in SHORT_INPUTS {
            all_idle(&run(&program, [f, i, w], 0.0), f64::from(p - 1) * f, &case);
        }
        assert_eq!(inside(&run(&program, EVEN, 0.0)), 0.0, "{case}");
        assert_eq!(program.peak_in_flight(), vec![2 * p - 1; p as usize], "{case}");
    }
}

/// From 2p−1 micro-batches on: (p−1)f, none of it between a rank's first and last action, at equal costs; never more than 2p
/// activations of a stage. With fewer micro-batches some idle inside.
#[test]
fn zero_bubble_v() {
    for (p, m) in sizes() {
        let program = program(zb_v(p, m));
        let timeline = run(&program, EVEN, 0.0);
        let case = format!("p={p} m={m}");
        assert!(program.peak_in_flight().iter().all(|&peak| peak <= 2 * p), "{case}");
        if m >= 2 * p - 1 {
            all_idle(&timeline, f64::from(p - 1), &case);
            assert_eq!(inside(&timeline), 0.0, "{case}");
            assert_eq!(program.peak_in_flight(), vec![2 * p; p as usize], "{case}");
        } else {
            assert!(inside(&timeline) > 0.0, "{case}");
        }
    }
}

/// 3p−7 and p+2 activations of a stage for an even p from 4 on, 3p−4 and p+1 for an odd one, at equal costs, from 2p
/// micro-batches on.
#[test]
fn half_of_the_memory() {
    for (p, m) in sizes() {
        let program = program(v_half(p, m));
        let case = format!("p={p} m={m}");
        let most = p + if p % 2 == 0 { 2 } else { 1 };
        let peak = program.peak_in_flight().iter().copied().max().unwrap();
        assert!(peak <= most, "{case}");
        if m >= 2 * p {
            let idle = match p {
                1 => 0,
                2 => 1,
                _ if p % 2 == 0 => 3 * p - 7,
                _ => 3 * p - 4,
            };
            all_idle(&run(&program, EVEN, 0.0), f64::from(idle), &case);
            assert_eq!(peak, most, "{case}");
        }
    }
}

/// 4p−7 if 3 divides p, 4p−5 otherwise, at equal costs; 2⌊(p+1)/3⌋ + 2 activations of a stage: 4, 8, 12 for 4, 8, 16 ranks.
#[test]
fn a_third_of_the_memory() {
    for (p, m) in sizes() {
        let program = program(v_min(p, m));
        let case = format!("p={p} m={m}");
        let most = 2 * ((p + 1) / 3) + 2;
        let peak = program.peak_in_flight().iter().copied().max().unwrap();
        assert!(peak <= most, "{case}");
        if m >= 2 * p {
            let idle = match p {
                1 => 0,
                _ if p % 3 == 0 => 4 * p - 7,
                _ => 4 * p - 5,
            };
            all_idle(&run(&program, EVEN, 0.0), f64::from(idle), &case);
            assert_eq!(peak, most, "{case}");
        }
    }
}

/// The largest of the benchmarks, 2.6 million actions with messages: work that grows faster than they do would take hours here.
#[test]
fn a_large_pipeline() {
    let (p, v, m) = (64, 4, 1024);
    let program = program(interleaved_1f1b(p, v, m, None));
    let [f, i, w] = EVEN;
    all_idle(&run(&program, EVEN, 0.0), f64::from(p - 1) * (f + i + w), "p=64 v=4 m=1024");
    let peak: Vec<u32> = (0..p).map(|r| p * v + p - 1 - 2 * r).collect();
    assert_eq!(program.peak_in_flight(), peak);
}

/// (p−1)(f+b) as without overlaps; p·v + p activations on rank 0, those of both passes of a pair, and 2 fewer per rank, unless
/// there are fewer.
#[test]
fn overlapped() {
    for (p, m) in sizes().filter(|(p, m)| m.is_multiple_of(*p)) {
        for v in 1..=3 {
            let program = program(overlapped_1f1b(p, v, m, None));
            let case = format!("p={p} v={v} m={m}");
            for [f, i, w] in [EVEN, UNEVEN] {
                all_idle(&run(&program, [f, i, w], 0.0), f64::from(p - 1) * (f + i + w), &case);
            }
            let peak: Vec<u32> = (0..p).map(|r| (p * v + p - 2 * r).min(m * v)).collect();
            assert_eq!(program.peak_in_flight(), peak, "{case}");
        }
    }
}

/// (p−1)(F&B + B − 3W) over p ranks, and (p/2−1) times as much for two copies, at equal costs. Where overlaps gain time, ranks
/// with fewer of them are busy longer and idle less. 2p+1 activations, and p+1.
#[test]
fn dual_pipes() {
    let check = |program: &Program, ranks_each_way: u32, peak: u32, case: &str| {
        let [f, i, w] = EVEN;
        let b = i + w;
        for overlap in [0.0, 0.5, 1.0] {
            let both = f + b - overlap * f.min(b);
            let idle = f64::from(ranks_each_way - 1) * (both + b - 3.0 * w);
            let timeline = run(program, EVEN, overlap);
            if overlap == 0.0 {
                all_idle(&timeline, idle, case);
            }
            let most = timeline.idle.iter().map(|idle| idle.total()).fold(0.0, f64::max);
            assert_eq!(most, idle, "{case} overlap={overlap}");
        }
        assert_eq!(program.peak_in_flight(), vec![peak; program.peak_in_flight().len()], "{case}");
    };
    for (p, m) in sizes().filter(|(p, m)| *m >= 2 * p) {
        check(&program(dual_pipe_v(p, m)), p, 2 * p + 1, &format!("DualPipeV p={p} m={m}"));
        if p.is_multiple_of(2) && m.is_multiple_of(2) {
            check(&program(dual_pipe(p, m)), p / 2, p + 1, &format!("DualPipe p={p} m={m}"));
        }
    }
}
