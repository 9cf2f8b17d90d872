//! The simulator against closed forms, examples done by hand, and an independent recurrence.

mod common;

use std::collections::HashMap;

use common::{Draws, draw_schedule};
use moe_pipeline::generate::{dual_pipe_v, forward_only, gpipe, one_f_one_b, zb_h1, zb_h2};
use moe_pipeline::{
    Action, Costs, Error, Flow, Idle, Kind, Link, Message, Overlap, Program, Schedule, Span, StageCost,
    Timeline, lower, simulate, validate,
};
use proptest::prelude::*;

fn program(schedule: &Schedule) -> Program {
    validate(lower(schedule).unwrap(), None).unwrap()
}

fn cost(forward: f64, backward_input: f64, backward_weight: f64) -> StageCost {
    StageCost { forward, backward_input, backward_weight }
}

/// Costs that binary floating point adds exactly.
fn exact(draws: &mut Draws) -> f64 {
    draws.below(64) as f64 / 8.0
}

#[test]
fn idle_of_gpipe_and_one_f_one_b_is_the_closed_form() {
    for p in 1..=8 {
        for m in 1..=16 {
            for (f, i, w) in [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75), (2.0, 0.5, 0.25), (0.5, 3.0, 4.0)] {
                for generate in [gpipe, one_f_one_b] {
                    let timeline = simulate(
                        &program(&generate(p, m).unwrap()),
                        &Costs::uniform(p, cost(f, i, w), Link::FREE),
                    )
                    .unwrap();
                    let idle = f64::from(p - 1) * (f + i + w);
                    for rank in &timeline.idle {
                        assert_eq!(rank.total(), idle, "p={p} m={m}");
                        assert_eq!((rank.link, rank.send), (0.0, 0.0));
                    }
                    let work = f64::from(m) * (f + i + w);
                    assert_eq!(timeline.makespan, work + idle);
                    assert!((timeline.bubble_fraction() - idle / (work + idle)).abs() < 1e-15);
                }
            }
        }
    }
}

#[test]
fn causes_of_idling_by_hand() {
    let costs = Costs::uniform(2, cost(1.0, 1.25, 0.75), Link { transfer: 0.5, latency: 0.25 });
    let timeline = simulate(&program(&gpipe(2, 1).unwrap()), &costs).unwrap();
    // 1F0 starts at 1 + 0.75, 1B0 ends at 4.75, 0B0 runs from 5.5 to 7.5.
    assert_eq!(timeline.makespan, 7.5);
    let causes = |idle: &Idle| [idle.activation, idle.gradient, idle.link, idle.send, idle.drain];
    assert_eq!(causes(&timeline.idle[0]), [0.0, 3.75, 0.75, 0.0, 0.0]);
    assert_eq!(causes(&timeline.idle[1]), [1.0, 0.0, 0.75, 0.5, 2.25]);
    let spans: Vec<_> = timeline.spans[1].iter().map(|s| (s.action.to_string(), s.start, s.end)).collect();
    assert_eq!(spans, [("1F0".to_owned(), 1.75, 2.75), ("1B0".to_owned(), 2.75, 4.75)]);
}

#[test]
fn messages_queue_for_a_slow_link() {
    let costs = Costs::uniform(2, cost(1.0, 1.0, 1.0), Link { transfer: 3.0, latency: 0.0 });
    let timeline = simulate(&program(&forward_only(2, 3).unwrap()), &costs).unwrap();
    // The link is busy from 1 to 10, and the last forward pass follows.
    assert_eq!(timeline.makespan, 11.0);
    assert_eq!(timeline.idle[1].total(), 8.0);
    // The third send waits for the second: from 5 to 7, after the second waited for the first: from 2 to 4.
    assert_eq!(timeline.idle[0].send, 2.0 + 2.0 + 3.0);
}

#[test]
fn stages_of_one_rank_share_its_links() {
    let costs = Costs::uniform(4, cost(1.0, 1.0, 1.0), Link { transfer: 3.0, latency: 0.0 });
    let schedule: Schedule = "0F0,2F0,0F1,2F1\n1F0,3F0,1F1,3F1\n".parse().unwrap();
    let timeline = simulate(&program(&schedule), &costs).unwrap();
    let starts = |rank: usize| timeline.spans[rank].iter().map(|span| span.start).collect::<Vec<_>>();
    // The output of 2F0 leaves from 9 to 12, so that of 0F1, which is made at 10, leaves from 12 to 15.
    assert_eq!(starts(0), [0.0, 8.0, 9.0, 19.0]);
    assert_eq!(starts(1), [4.0, 12.0, 15.0, 23.0]);
}

#[test]
fn an_overlap_hides_part_of_its_shorter_pass() {
    let schedule: Schedule = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n".parse().unwrap();
    for (overlap, pair) in [(0.0, 5.0), (0.5, 4.0), (1.0, 3.0)] {
        let costs =
            Costs { overlap: Overlap::Hidden(overlap), ..Costs::uniform(1, cost(2.0, 1.0, 2.0), Link::FREE) };
        let timeline = simulate(&program(&schedule), &costs).unwrap();
        assert_eq!(timeline.makespan, 2.0 + pair + 3.0);
        assert_eq!((timeline.spans[0][1].start, timeline.spans[0][1].end), (2.0, 2.0 + pair));
        assert_eq!(timeline.idle[0].total(), 0.0);
    }
}

#[test]
fn drawing() {
    let timeline =
        simulate(&program(&one_f_one_b(3, 4).unwrap()), &Costs::uniform(3, cost(1.0, 1.0, 1.0), Link::FREE))
            .unwrap();
    assert_eq!(
        timeline.draw(54),
        concat!(
            "rank 0 0--1--2--............0=====3--1=====...2=====...3=====\n",
            "rank 1 ...0--1--......0=====2--1=====3--2=====...3=====......\n",
            "rank 2 ......0--0=====1--1=====2--2=====3--3=====............\n",
        )
    );
    let nothing =
        simulate(&program(&gpipe(2, 1).unwrap()), &Costs::uniform(2, cost(0.0, 0.0, 0.0), Link::FREE))
            .unwrap();
    assert_eq!((nothing.draw(3), nothing.bubble_fraction()), ("rank 0 ...\nrank 1 ...\n".to_owned(), 0.0));
}

/// Numbers after `key` in all of a text.
fn numbers(text: &str, key: &str) -> Vec<f64> {
    let number = |rest: &str| rest[..rest.find([',', '}', '"']).unwrap()].parse().unwrap();
    text.split(key).skip(1).map(number).collect()
}

#[test]
fn drawings_and_traces_show_every_span() {
    let schedule = dual_pipe_v(2, 5).unwrap();
    let timeline =
        simulate(&program(&schedule), &Costs::uniform(4, cost(1.0, 1.25, 0.75), Link::FREE)).unwrap();
    let spans: Vec<_> = timeline.spans.iter().flatten().collect();

    let svg = timeline.svg();
    assert_eq!(svg.matches("<g>").count(), spans.len());
    for (opened, closed) in
        [("<g>", "</g>"), ("<title>", "</title>"), ("<text ", "</text>"), ("<svg ", "</svg>")]
    {
        assert_eq!(svg.matches(opened).count(), svg.matches(closed).count());
    }
    assert!(
        spans.iter().all(|s| svg.contains(&format!("<title>{}, {} to {}</title>", s.action, s.start, s.end)))
    );
    // A rectangle per pass, five of the legend, two rows and the ground; none reaches beyond the drawing.
    let passes: usize = spans.iter().map(|s| s.action.parts().count()).sum();
    assert_eq!(svg.matches("<rect ").count(), passes + 5 + 2 + 1);
    let ends = numbers(&svg, " x=\"").into_iter();
    assert!(ends.into_iter().all(|x| (0.0..=1280.0).contains(&x)));
    // hsl(210, 70%, 78%), a forward pass of a first stage.
    assert!(svg.contains("fill=\"#a0c7ee\""));
    // A strip per rank, of as many activations as the program keeps.
    assert_eq!((svg.matches("<path ").count(), svg.matches(">keeps 5<").count()), (2, 2));

    let trace = timeline.chrome_trace();
    assert_eq!(trace.matches("\"ph\":\"X\"").count(), spans.len() + timeline.trips.len());
    for s in &spans {
        let event = format!("\"ts\":{},\"dur\":{}}}", s.start, s.end - s.start);
        assert!(
            trace.lines().any(|line| line.contains(&format!("\"{}\"", s.action)) && line.contains(&event))
        );
    }
    let peak = numbers(&trace, "\"kept\":").into_iter().fold(0.0, f64::max);
    assert_eq!(peak, 5.0);
    assert!(trace.ends_with("}\n]}\n") && trace.starts_with("{\"traceEvents\":["));
    let events = trace.lines().filter(|line| line.contains("\"ph\"")).count();
    assert_eq!(trace.matches("},\n").count(), events - 1);

    let evaluation =
        simulate(&program(&forward_only(2, 5).unwrap()), &Costs::uniform(2, cost(1.0, 0.0, 0.0), Link::FREE));
    assert!(!evaluation.unwrap().svg().contains("kept"));
    let mut nothing = Timeline::default();
    nothing.spans.push(Vec::new());
    assert!(nothing.svg().contains("rank 0") && nothing.chrome_trace().contains("rank 0"));
}

/// A part of a timeline, which has backward passes without their forward ones, and one that makes no sense.
#[test]
fn any_timeline_can_be_drawn() {
    let schedule: Schedule = "0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1B0,1F2,1B1,1B2\n".parse().unwrap();
    let mut timeline =
        simulate(&program(&schedule), &Costs::uniform(2, cost(1.0, 1.0, 1.0), Link::FREE)).unwrap();
    timeline.spans[0].drain(..4);
    timeline.spans[1].drain(..2);
    let svg = timeline.svg();
    // 0B1 and 0B2 free two; 1B0 and 1B1 free two, between which 1F2 keeps another.
    assert_eq!((svg.matches(">keeps 2<").count(), svg.matches("<path ").count()), (2, 2));
    let kept: Vec<f64> = numbers(&timeline.chrome_trace(), "\"kept\":");
    assert_eq!(kept, [2.0, 1.0, 0.0, 2.0, 1.0, 2.0, 1.0, 0.0]);

    let input = Span { action: Action::new(0, Kind::BackwardInput, 0), start: 2.0, end: 1.0 };
    timeline.spans = vec![vec![input]];
    assert!(timeline.svg().contains(">keeps 0<") && !timeline.svg().contains("NaN"));
    assert_eq!(timeline.draw(4), "rank 0 ....\n");
}

#[test]
fn costs_are_checked() {
    let program = program(&gpipe(2, 1).unwrap());
    let good = Costs::uniform(2, cost(1.0, 1.0, 1.0), Link::FREE);
    let simulate = |change: fn(&mut Costs)| {
        let mut costs = good.clone();
        change(&mut costs);
        simulate(&program, &costs)
    };
    assert_eq!(
        simulate(|c| c.stages.truncate(1)),
        Err(Error::CostCount { what: "stages", expected: 2, got: 1 })
    );
    assert_eq!(simulate(|c| c.links.clear()), Err(Error::CostCount { what: "links", expected: 1, got: 0 }));
    assert_eq!(
        simulate(|c| c.stages[1].backward_weight = -1.0),
        Err(Error::Cost { what: "stage", index: 1, value: -1.0 })
    );
    assert!(matches!(
        simulate(|c| c.links[0].latency = f64::NAN),
        Err(Error::Cost { what: "link", index: 0, .. })
    ));
    assert!(matches!(simulate(|c| c.stages[0].forward = f64::INFINITY), Err(Error::Cost { .. })));
    assert_eq!(simulate(|c| c.overlap = Overlap::Hidden(1.5)), Err(Error::OverlapShare { value: 1.5 }));
    assert!(matches!(simulate(|c| c.overlap = Overlap::Hidden(f64::NAN)), Err(Error::OverlapShare { .. })));
}

/// Without links: an action starts when the rank's last one and the action it depends on have ended.
fn recurrence(schedule: &Schedule, costs: &Costs, overlap: f64) -> f64 {
    let placement = schedule.placement();
    let ranks = placement.ranks();
    let mut now = vec![0.0_f64; ranks as usize];
    let mut next = vec![0; ranks as usize];
    let mut made = HashMap::new();
    let mut moved = true;
    while moved {
        moved = false;
        for rank in 0..ranks {
            let r = rank as usize;
            let Some(&action) = schedule.list(rank).get(next[r]) else { continue };
            let inputs: Vec<_> = action.parts().filter_map(|part| part.input(placement)).collect();
            let Some(ready) = inputs.iter().try_fold(0.0_f64, |at, input| Some(at.max(*made.get(input)?)))
            else {
                continue;
            };
            let took = |part: Action| {
                let cost = &costs.stages[part.stage as usize];
                match part.kind {
                    Kind::Forward => cost.forward,
                    Kind::BackwardInput => cost.backward_input,
                    Kind::BackwardWeight => cost.backward_weight,
                    _ => cost.backward_input + cost.backward_weight,
                }
            };
            let took: Vec<f64> = action.parts().map(took).collect();
            let hidden = if took.len() == 2 { overlap * took[0].min(took[1]) } else { 0.0 };
            now[r] = now[r].max(ready) + took.iter().sum::<f64>() - hidden;
            made.extend(
                action.parts().filter_map(|part| part.output(placement)).map(|output| (output, now[r])),
            );
            next[r] += 1;
            moved = true;
        }
    }
    now.into_iter().fold(0.0, f64::max)
}

fn conserved(timeline: &Timeline) {
    for (spans, idle) in timeline.spans.iter().zip(&timeline.idle) {
        let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
        assert_eq!(busy + idle.total(), timeline.makespan);
        assert!([idle.activation, idle.gradient, idle.link, idle.send, idle.drain].iter().all(|&t| t >= 0.0));
        assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any schedule over any links: time is conserved, and no link makes it faster than without.
    #[test]
    fn time_is_conserved(p in 1_u32..=8, extra in 0_u32..=4, m in 1_u32..=8, seed: u64) {
        let mut draws = Draws(seed);
        let schedule = draw_schedule(p, extra, m, &mut draws);
        let stages: Vec<StageCost> =
            (0..p + extra).map(|_| cost(exact(&mut draws), exact(&mut draws), exact(&mut draws))).collect();
        let links: Vec<Link> =
            (1..p + extra).map(|_| Link { transfer: exact(&mut draws), latency: exact(&mut draws) }).collect();
        let overlap = draws.below(5) as f64 / 4.0;
        let costs = Costs { stages, links, overlap: Overlap::Hidden(overlap) };
        let timeline = simulate(&program(&schedule), &costs).unwrap();
        conserved(&timeline);
        let without_links = recurrence(&schedule, &costs, overlap);
        prop_assert!(timeline.makespan >= without_links);
        let free = Costs { links: vec![Link::FREE; costs.links.len()], ..costs };
        prop_assert_eq!(simulate(&program(&schedule), &free).unwrap().makespan, without_links);
    }

    /// By what messages did, told apart from the simulator: a rank idles for an activation or a gradient until it is made, and for
    /// a link from then on until it has arrived; the trips of a link do not overlap; no message comes before it is made.
    #[test]
    fn idle_time_has_its_cause(p in 2_u32..=6, m in 1_u32..=8, which in 0_usize..4, seed: u64) {
        let mut draws = Draws(seed);
        let schedule = [one_f_one_b, gpipe, zb_h1, zb_h2][which](p, m).unwrap();
        let placement = schedule.placement();
        let stages = (0..p).map(|_| cost(exact(&mut draws), exact(&mut draws), exact(&mut draws))).collect();
        // Links that are free at once, so that no send waits.
        let links = (1..p).map(|_| Link { transfer: 0.0, latency: exact(&mut draws) }).collect();
        let costs = Costs { stages, links, overlap: Overlap::Hidden(0.0) };
        let timeline = simulate(&program(&schedule), &costs).unwrap();
        let mut made = HashMap::new();
        for span in timeline.spans.iter().flatten() {
            made.extend(span.action.output(placement).map(|output| (output, span.end)));
        }
        let arrives = |message: Message| {
            let boundary = message.stage as usize - usize::from(message.flow == Flow::Forward);
            made[&message] + costs.links[boundary].latency
        };
        for (spans, idle) in timeline.spans.iter().zip(&timeline.idle) {
            let (mut now, mut expected) = (0.0_f64, Idle::default());
            for span in spans {
                if let Some(input) = span.action.input(placement) {
                    let until_made = (made[&input] - now).max(0.0);
                    match input.flow {
                        Flow::Forward => expected.activation += until_made,
                        Flow::Backward => expected.gradient += until_made,
                    }
                    expected.link += (arrives(input) - now.max(made[&input])).max(0.0);
                }
                now = span.end;
            }
            expected.drain = timeline.makespan - now;
            prop_assert_eq!(*idle, expected);
        }
        prop_assert_eq!(timeline.trips.len(), 2 * (p as usize - 1) * m as usize);
        for trip in &timeline.trips {
            prop_assert!(trip.start >= made[&trip.message]);
            prop_assert_eq!(trip.arrived - trip.start, costs.links[trip.from.min(trip.to) as usize].latency);
        }
    }
}
