//! Slots against the lives of values, counted without them.

mod common;

use std::collections::HashMap;

use common::{Draws, draw_schedule};
use moe_pipeline::generate::{
    dual_pipe, dual_pipe_v, forward_only, gpipe, interleaved_1f1b, one_f_one_b, overlapped_1f1b, zb_h2, zb_v,
};
use moe_pipeline::{Action, Buffers, Kind, Life, Pass, Program, Schedule, Value, lower, validate};
use proptest::prelude::*;

fn program(schedule: &Schedule) -> Program {
    validate(lower(schedule).unwrap(), None).unwrap()
}

/// Every life of a rank's list, by looking for the first and the last action of each value.
fn lives(program: &Program, rank: u32) -> HashMap<Value, (usize, usize)> {
    let schedule = program.schedule();
    let placement = schedule.placement();
    let parts: Vec<(usize, Action)> = (0..)
        .zip(schedule.list(rank))
        .flat_map(|(index, action)| action.parts().map(move |part| (index, part)))
        .collect();
    let find =
        |of: &dyn Fn(Action) -> bool| parts.iter().find(|(_, part)| of(*part)).map(|(index, _)| *index);
    let mut lives = HashMap::new();
    for &(index, part) in &parts {
        let Action { stage, microbatch, kind } = part;
        let of = |kinds: &'static [Kind]| {
            find(&|a| kinds.contains(&a.kind) && (a.stage, a.microbatch) == (stage, microbatch)).unwrap()
        };
        match kind {
            Kind::Forward if schedule.pass() == Pass::ForwardBackward => {
                let until = of(&[Kind::Backward, Kind::BackwardInput]);
                lives.insert(Value::Saved { stage, microbatch }, (index, until));
            }
            Kind::BackwardInput => {
                let until = of(&[Kind::BackwardWeight]);
                lives.insert(Value::Deferred { stage, microbatch }, (index, until));
            }
            Kind::Send(flow) => {
                let message = part.message(placement).unwrap();
                let from = find(&|a| a.output(placement) == Some(message)).unwrap();
                let wait = Kind::WaitSend(flow);
                let until = find(&|a| a == Action { kind: wait, ..part }).unwrap();
                lives.insert(Value::Sent(message), (from, until));
            }
            _ => {}
        }
        if let Some(input) = part.input(placement) {
            let made = |a: Action| a.output(placement) == Some(input);
            let received = |a: Action| matches!(a.kind, Kind::Recv(_)) && a.message(placement) == Some(input);
            let from = find(&|a| made(a) || received(a)).unwrap();
            lives.insert(Value::Received(input), (from, index));
        }
    }
    lives
}

/// No two values that are alive at once share a slot; and there are as many slots as values are ever alive at once.
fn check(program: &Program) {
    for rank in 0..program.schedule().placement().ranks() {
        let buffers = program.buffers(rank);
        let lives = lives(program, rank);
        let named: HashMap<Value, (usize, usize)> =
            buffers.lives().iter().map(|life| (life.value, (life.from, life.until))).collect();
        assert_eq!(named, lives, "rank {rank}");
        assert_eq!(buffers.lives().len(), lives.len());
        type Class = (fn(&Value) -> bool, fn(&Buffers) -> u32);
        let classes: [Class; 4] = [
            (|value| matches!(value, Value::Saved { .. }), Buffers::saved),
            (|value| matches!(value, Value::Deferred { .. }), Buffers::deferred),
            (|value| matches!(value, Value::Received(_)), Buffers::received),
            (|value| matches!(value, Value::Sent(_)), Buffers::sent),
        ];
        for (of_class, slots) in classes {
            let of_class: Vec<&Life> = buffers.lives().iter().filter(|life| of_class(&life.value)).collect();
            for (at, a) in of_class.iter().enumerate() {
                assert_eq!(buffers.slot(a.value), Some(a.slot));
                let apart = |b: &&Life| a.slot != b.slot || a.until < b.from || b.until < a.from;
                assert!(of_class[at + 1..].iter().all(apart), "{a:?}");
            }
            let alive = |index: usize| {
                of_class.iter().filter(|life| (life.from..=life.until).contains(&index)).count()
            };
            let peak = (0..program.schedule().list(rank).len()).map(alive).max().unwrap_or(0);
            assert_eq!(slots(&buffers) as usize, peak, "rank {rank}");
        }
    }
}

#[test]
fn slots_are_as_few_as_can_be() {
    for schedule in [
        gpipe(3, 5),
        one_f_one_b(4, 9),
        interleaved_1f1b(2, 3, 6, None),
        overlapped_1f1b(3, 2, 6, None),
        zb_h2(3, 7),
        zb_v(3, 7),
        dual_pipe_v(2, 7),
        dual_pipe(4, 10),
        forward_only(3, 4),
    ] {
        check(&program(&schedule.unwrap()));
    }
}

/// Where backward passes are whole, what is saved is what is in flight.
#[test]
fn saved_slots_are_the_peak_in_flight() {
    for (p, m) in [(1, 3), (4, 2), (4, 9), (7, 30)] {
        for schedule in
            [gpipe(p, m).unwrap(), one_f_one_b(p, m).unwrap(), overlapped_1f1b(p, 1, m, None).unwrap()]
        {
            let program = program(&schedule);
            let saved: Vec<u32> = (0..p).map(|rank| program.buffers(rank).saved()).collect();
            assert_eq!(saved, program.peak_in_flight());
        }
    }
    let program = program(&one_f_one_b(2, 3).unwrap());
    assert_eq!(program.buffers(2), Buffers::default());
    assert_eq!(program.buffers(0).slot(Value::Saved { stage: 1, microbatch: 0 }), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn of_any_schedule(p in 1_u32..=6, extra in 0_u32..=4, m in 1_u32..=10, seed: u64) {
        check(&program(&draw_schedule(p, extra, m, &mut Draws(seed))));
    }
}
