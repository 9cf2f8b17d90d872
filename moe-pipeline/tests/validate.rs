//! The validator against named faults, against mutants, and against an independent brute-force checker.

mod common;

use std::collections::HashSet;

use common::{Draws, draw_named, draw_schedule, equals_sequential, lists, revalidate};
use moe_pipeline::generate::{Named, for_costs, forward_only, gpipe, one_f_one_b};
use moe_pipeline::{
    Action, Costs, Error, Flow, Kind, Link, Pass, Placement, Schedule, StageCost, lower, validate,
};
use proptest::prelude::*;

fn reject(text: &str) -> Error {
    validate(text.parse().unwrap(), None).unwrap_err()
}

/// `rank:index:action` of the fault.
fn place(error: &Error) -> String {
    match error {
        Error::Duplicate { at }
        | Error::OutOfOrder { at, .. }
        | Error::Premature { at, .. }
        | Error::OverBudget { at, .. } => format!("{}:{}:{}", at.rank, at.index, at.action),
        other => panic!("{other}"),
    }
}

#[test]
fn a_fault_is_named_with_rank_index_and_action() {
    let good = "0F0,0SEND_F0,0RECV_B0,0WAIT_RECV_B0,0B0,0WAIT_SEND_F0\n1RECV_F0,1WAIT_RECV_F0,1F0,1B0,1SEND_B0,1WAIT_SEND_B0\n";
    assert_eq!(lower(&gpipe(2, 1).unwrap()).unwrap().to_string(), good);
    for (from, to, fault, needs) in [
        ("0F0,0SEND_F0", "0SEND_F0,0F0", "0:0:0SEND_F0", "0F0"),
        ("0RECV_B0,0WAIT_RECV_B0", "0WAIT_RECV_B0,0RECV_B0", "0:2:0WAIT_RECV_B0", "0RECV_B0"),
        ("0WAIT_RECV_B0,0B0", "0B0,0WAIT_RECV_B0", "0:3:0B0", "0WAIT_RECV_B0"),
        ("1F0,1B0", "1B0,1F0", "1:2:1B0", "1F0"),
        ("1SEND_B0,1WAIT_SEND_B0", "1WAIT_SEND_B0,1SEND_B0", "1:4:1WAIT_SEND_B0", "1SEND_B0"),
        ("1B0,1SEND_B0", "1SEND_B0,1B0", "1:3:1SEND_B0", "1B0"),
        ("1F0,1B0", "1F0,1W0,1I0", "1:3:1W0", "1I0"),
    ] {
        let error = reject(&good.replace(from, to));
        assert_eq!(place(&error), fault);
        assert!(matches!(error, Error::Premature { needs: n, .. } if n.to_string() == needs), "{error}");
    }
    for (twice, fault) in [
        ("0F0", "0:1:0F0"),
        ("0SEND_F0", "0:2:0SEND_F0"),
        ("0RECV_B0", "0:3:0RECV_B0"),
        ("0WAIT_RECV_B0", "0:4:0WAIT_RECV_B0"),
        ("0B0", "0:5:0B0"),
        ("1WAIT_SEND_B0", "1:6:1WAIT_SEND_B0"),
    ] {
        let error = reject(&good.replace(twice, &format!("{twice},{twice}")));
        assert!(matches!(error, Error::Duplicate { .. }), "{error}");
        assert_eq!(place(&error), fault);
    }
    for (without, rank) in
        [(",0B0", 0), ("0SEND_F0,", 0), (",0WAIT_SEND_F0", 0), (",1SEND_B0,1WAIT_SEND_B0", 1)]
    {
        let error = reject(&good.replace(without, ""));
        let action: Action = match without.trim_matches(',').split(',').next() {
            // Its wait is found before its absence.
            Some("0SEND_F0") => {
                assert!(matches!(error, Error::Premature { needs, .. } if needs.to_string() == "0SEND_F0"));
                continue;
            }
            first => first.unwrap().parse().unwrap(),
        };
        assert_eq!(error, Error::Missing { rank, action });
    }
    assert!(matches!(reject("0F0,0I0\n"), Error::Missing { rank: 0, action } if action.to_string() == "0W0"));
}

#[test]
fn sums_ascend_per_stage() {
    assert_eq!(place(&reject("0F0,0F1,0B1,0B0\n")), "0:2:0B1");
    assert_eq!(place(&reject("0F1,0F0,0B0,0B1\n")), "0:0:0F1");
    assert_eq!(place(&reject("0F0,0F1,0I0,0I1,0W1,0W0\n")), "0:4:0W1");
    // B adds to the weights too, before the W of the micro-batch ahead of it.
    assert_eq!(place(&reject("0F0,0F1,0I0,0B1,0W0\n")), "0:3:0B1");
    assert!(validate("0F0,0F1,0I0,0W0,0B1\n".parse().unwrap(), None).is_ok());
}

#[test]
fn the_parts_of_an_overlap_are_independent() {
    assert!(validate("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n".parse().unwrap(), None).is_ok());
    let error = reject("(0F0;0B0)OVERLAP_F_B\n");
    assert!(matches!(error, Error::Premature { needs, .. } if needs.to_string() == "0F0"), "{error}");
    assert_eq!(place(&error), "0:0:(0F0;0B0)OVERLAP_F_B");
    // A fault of a part is named by the part, at the overlap's index.
    assert_eq!(place(&reject("0F0,(0F2;0B0)OVERLAP_F_B,0F1,0B1,0B2\n")), "0:1:0F2");
    assert_eq!(place(&reject("0F0,0F1,(0F2;0B1)OVERLAP_F_B,0B0,0B2\n")), "0:2:0B1");
}

#[test]
fn copies_take_their_own_micro_batches() {
    let good = "0F0,0B0\n1F1,1B1\n";
    let schedule: Schedule = good.parse().unwrap();
    assert_eq!((schedule.placement().copies(), schedule.placement().stages()), (2, 2));
    assert_eq!(
        (schedule.microbatches_of(0), schedule.microbatches_of(1), schedule.microbatches_of(2)),
        (0..1, 1..2, 0..0)
    );
    assert!(validate(schedule, None).is_ok());
    let placement = Placement::with_copies(vec![0, 1], 2).unwrap();
    let lists = vec![vec!["0F1".parse().unwrap()], vec!["1F1".parse().unwrap()]];
    let error = Schedule::new(placement, 2, Pass::ForwardBackward, lists).unwrap_err();
    assert_eq!(
        error.to_string(),
        "0F1 (rank 0, index 0): this copy of the pipeline takes micro-batches 0..1"
    );
    assert_eq!(Placement::with_copies(vec![0, 1, 0], 2), Err(Error::Copies { stages: 3, copies: 2 }));
    assert_eq!(Placement::with_copies(vec![0, 1, 0], 0), Err(Error::Copies { stages: 3, copies: 0 }));
}

#[test]
fn neighbours_on_one_rank_need_no_message_but_an_order() {
    assert!(validate("0F0,1F0,1B0,0B0\n".parse().unwrap(), None).is_ok());
    assert!(
        matches!(reject("1F0,0F0,1B0,0B0\n"), Error::Premature { needs, .. } if needs.to_string() == "0F0")
    );
    assert!(
        matches!(reject("0F0,1F0,0B0,1B0\n"), Error::Premature { needs, .. } if needs.to_string() == "1B0")
    );
}

#[test]
fn messages_placed_rank_by_rank_deadlock_under_rendezvous() {
    // Each receive just before its use, each send just after its origin.
    let naive = |schedule: &Schedule| {
        let placement = schedule.placement();
        let around = |&action: &Action| {
            let with = |kind| Action { kind, ..action };
            let input =
                action.input(placement).map(|m| [with(Kind::Recv(m.flow)), with(Kind::WaitRecv(m.flow))]);
            let output =
                action.output(placement).map(|m| [with(Kind::Send(m.flow)), with(Kind::WaitSend(m.flow))]);
            input
                .into_iter()
                .flatten()
                .chain([action])
                .chain(output.into_iter().flatten())
                .collect::<Vec<_>>()
        };
        revalidate(
            schedule,
            lists(schedule).iter().map(|list| list.iter().flat_map(around).collect()).collect(),
        )
    };
    assert!(naive(&gpipe(4, 4).unwrap()).is_ok());
    let Err(Error::Deadlock { cycle }) = naive(&one_f_one_b(2, 2).unwrap()) else { panic!() };
    let cycle: Vec<String> = cycle.iter().map(ToString::to_string).collect();
    assert_eq!(cycle, ["0SEND_F1 (rank 0, index 4)", "1SEND_B0 (rank 1, index 4)"]);
    for (p, m) in [(2, 3), (3, 3), (4, 8), (8, 16)] {
        assert!(matches!(naive(&one_f_one_b(p, m).unwrap()), Err(Error::Deadlock { .. })));
    }
    // Three ranks in a circle: 0 waits for 1, 1 for 2, 2 for 0.
    let circle = "0F0,3F0,0SEND_F0,0WAIT_SEND_F0\n1RECV_F0,1WAIT_RECV_F0,1F0,1SEND_F0,1WAIT_SEND_F0\n\
                  2RECV_F0,2WAIT_RECV_F0,2F0,2SEND_F0,2WAIT_SEND_F0\n";
    let circle = circle.replace("0F0,3F0", "0F0,3RECV_F0,3WAIT_RECV_F0,3F0");
    let Error::Deadlock { cycle } = reject(&circle) else { panic!() };
    assert_eq!(cycle.len(), 3);
}

#[test]
fn peak_is_the_closed_form_and_meets_the_budget() {
    for p in 1..=16 {
        for m in 1..=20 {
            let peak = |schedule: Schedule| {
                validate(lower(&schedule).unwrap(), None).unwrap().peak_in_flight().to_vec()
            };
            assert_eq!(peak(gpipe(p, m).unwrap()), vec![m; p as usize]);
            assert_eq!(peak(one_f_one_b(p, m).unwrap()), (0..p).map(|r| m.min(p - r)).collect::<Vec<_>>());
            assert_eq!(peak(forward_only(p, m).unwrap()), vec![0; p as usize]);
        }
    }
    // What `I` defers to `W` is kept until then.
    let split: Schedule = "0F0,0I0,0F1,0I1,0W0,0W1\n".parse().unwrap();
    assert_eq!(validate(split, None).unwrap().peak_in_flight(), [2]);

    let lowered = lower(&one_f_one_b(4, 8).unwrap()).unwrap();
    assert!(validate(lowered.clone(), Some(4)).is_ok());
    let error = validate(lowered, Some(3)).unwrap_err();
    assert!(matches!(error, Error::OverBudget { in_flight: 4, budget: 3, .. }));
    assert!(place(&error).starts_with("0:") && place(&error).ends_with("0F3"), "{error}");
}

/// The rules once more, without counters, tables or passes: sets, and blocking ranks polled until nothing moves.
fn brute_force(schedule: &Schedule) -> bool {
    let placement = schedule.placement();
    let (ranks, stages) = (placement.ranks(), placement.stages());
    let mut done = HashSet::new();
    let mut next = vec![0; ranks as usize];
    let forward_only = schedule.pass() == Pass::ForwardOnly;
    let can = |done: &HashSet<Action>, a: Action| {
        let has = |kind| done.contains(&Action { kind, ..a });
        let any =
            |stage, kinds: &[Kind], m| kinds.iter().any(|&kind| done.contains(&Action::new(stage, kind, m)));
        let ascending = |kinds: &[Kind]| {
            schedule.microbatches_of(a.stage).all(|m| any(a.stage, kinds, m) == (m < a.microbatch))
        };
        let (f, i, w, b) = (Kind::Forward, Kind::BackwardInput, Kind::BackwardWeight, Kind::Backward);
        let made = |flow| match flow {
            Flow::Forward => (a.stage - 1, vec![f]),
            Flow::Backward => (a.stage + 1, vec![i, b]),
        };
        let ready = a.input(placement).is_none_or(|input| {
            let (stage, kinds) = made(input.flow);
            match placement.rank_of(stage) == placement.rank_of(a.stage) {
                true => any(stage, &kinds, a.microbatch),
                false => has(Kind::WaitRecv(input.flow)),
            }
        });
        !done.contains(&a)
            && ready
            && match a.kind {
                Kind::Forward => ascending(&[f]),
                Kind::BackwardInput => has(f) && ascending(&[i, b]),
                Kind::BackwardWeight => has(i) && ascending(&[w, b]),
                Kind::Backward => has(f) && ascending(&[i, b]) && ascending(&[w, b]),
                Kind::Send(Flow::Forward) => has(f),
                Kind::Send(Flow::Backward) => has(i) || has(b),
                Kind::WaitSend(flow) => has(Kind::Send(flow)),
                Kind::WaitRecv(flow) => has(Kind::Recv(flow)),
                _ => true,
            }
    };
    let mut moved = true;
    while moved {
        moved = false;
        for rank in 0..ranks {
            let Some(&action) = schedule.list(rank).get(next[rank as usize]) else { continue };
            let mut together = vec![(rank, action)];
            if let (Kind::Send(_) | Kind::Recv(_), Some(message)) = (action.kind, action.message(placement)) {
                let other = |at: &(u32, Action)| {
                    at.1.message(placement) == Some(message)
                        && matches!(at.1.kind, Kind::Send(_) | Kind::Recv(_))
                        && at.1.kind != action.kind
                };
                let heads = (0..ranks).filter_map(|r| Some((r, *schedule.list(r).get(next[r as usize])?)));
                together.extend(heads.clone().find(other));
                if together.len() == 1 {
                    continue;
                }
            }
            if together.iter().all(|&(_, action)| action.parts().all(|part| can(&done, part))) {
                for (rank, action) in together {
                    done.extend(action.parts());
                    next[rank as usize] += 1;
                }
                moved = true;
            }
        }
    }
    let ended = (0..ranks).all(|rank| next[rank as usize] == schedule.list(rank).len());
    let complete = (0..stages).all(|stage| {
        schedule.microbatches_of(stage).all(|m| {
            let has = |kind| done.contains(&Action::new(stage, kind, m));
            let back = has(Kind::Backward) || has(Kind::BackwardWeight);
            let sent = [Kind::Forward, Kind::Backward].into_iter().all(|kind| {
                let Some(message) = Action::new(stage, kind, m).output(placement) else { return true };
                let local = placement.rank_of(stage) == placement.rank_of(message.stage);
                let skipped = forward_only && kind == Kind::Backward;
                local || skipped || has(Kind::Send(message.flow)) && has(Kind::WaitSend(message.flow))
            });
            has(Kind::Forward) && (forward_only || back) && sent
        })
    });
    ended && complete
}

/// Whether all ranks end where neighbouring sends and receives are one batch that blocks until all of it has met, as
/// NCCL's groups do.
fn ends_in_batches(schedule: &Schedule) -> bool {
    let is_message = |a: &Action| matches!(a.kind, Kind::Send(_) | Kind::Recv(_));
    let placement = schedule.placement();
    let mut batches: Vec<Vec<Vec<Action>>> = (0..placement.ranks())
        .map(|rank| {
            let runs = schedule.list(rank).chunk_by(|a, b| is_message(a) && is_message(b));
            runs.filter(|run| is_message(&run[0])).map(<[Action]>::to_vec).rev().collect()
        })
        .collect();
    loop {
        // What all ranks' present batches hold meets; batches that have met are done.
        let posted: Vec<Action> =
            batches.iter().filter_map(|of_rank| of_rank.last()).flatten().copied().collect();
        let meets = |a: &Action| {
            posted.iter().any(|b| b.kind != a.kind && a.message(placement) == b.message(placement))
        };
        if posted.is_empty() {
            return true;
        }
        for batch in batches.iter_mut().filter_map(|of_rank| of_rank.last_mut()) {
            batch.retain(|a| !meets(a));
        }
        let mut moved = false;
        for of_rank in &mut batches {
            moved |= of_rank.pop_if(|batch| batch.is_empty()).is_some();
        }
        if !moved && posted.iter().all(|a| !meets(a)) {
            return false;
        }
    }
}

fn drawn() -> impl Strategy<Value = (Schedule, u64)> {
    let which = 0..Named::ALL.len() + 8;
    (which, 1_u32..=8, 0_u32..=4, 1_u32..=16, any::<u64>()).prop_map(|(which, p, extra, m, seed)| {
        let mut draws = Draws(seed);
        let compute = match Named::ALL.get(which) {
            // One stage per rank takes all sizes; others are kept small, because every action of theirs is changed.
            Some(&named) if named.virtual_stages() == Some(1) => draw_named(named, p, 1, m, &mut draws),
            Some(&named) => draw_named(named, p.min(4), 1 + extra.min(2), m.min(6), &mut draws),
            None if which == Named::ALL.len() => forward_only(p, m).unwrap(),
            None if which == Named::ALL.len() + 1 => {
                let placement = Placement::v_shaped(p).unwrap();
                let mut time = || 1.0 + draws.below(8) as f64;
                let cost = StageCost { forward: time(), backward_input: time(), backward_weight: time() };
                let costs = Costs::uniform(2 * p, cost, Link { transfer: time() / 4.0, latency: 0.5 });
                for_costs(&placement, m.min(6), &costs, 2 + extra).unwrap()
            }
            None => draw_schedule(p, extra, m, &mut draws),
        };
        (lower(&compute).unwrap(), seed)
    })
}

/// Whether `b`, later on the same rank, must stay behind `a`: as the next of its kind and stage, or because it needs it.
fn ordered(a: Action, b: Action) -> bool {
    let same = |a: Action, b: Action| (a.kind, a.stage) == (b.kind, b.stage);
    depends_in_part(a, b) || a.parts().any(|a| b.parts().any(|b| same(a, b)))
}

/// Whether a part of `b` needs a part of `a`.
fn depends_in_part(a: Action, b: Action) -> bool {
    a.parts().any(|a| b.parts().any(|b| depends(a, b)))
}

/// Whether `b` needs `a`: as the same micro-batch of the same stage, or the same message.
fn depends(a: Action, b: Action) -> bool {
    use Kind::{Backward, BackwardInput, BackwardWeight, Forward, Recv, Send, WaitRecv, WaitSend};
    a.stage == b.stage
        && a.microbatch == b.microbatch
        && match (a.kind, b.kind) {
            (Forward, Backward | BackwardInput) | (BackwardInput, BackwardWeight) => true,
            (Forward, Send(Flow::Forward)) | (Backward | BackwardInput, Send(Flow::Backward)) => true,
            (WaitRecv(Flow::Forward), Forward) | (WaitRecv(Flow::Backward), Backward | BackwardInput) => true,
            (Send(x), WaitSend(y)) | (Recv(x), WaitRecv(y)) => x == y,
            _ => false,
        }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Every action dropped, in turn.
    #[test]
    fn every_drop_is_rejected((lowered, _) in drawn()) {
        for at in lowered.actions() {
            let mut lists = lists(&lowered);
            lists[at.rank as usize].remove(at.index);
            prop_assert!(revalidate(&lowered, lists).is_err(), "dropped {}", at);
        }
    }

    /// Every action duplicated, in turn, to a random place of its rank and to one of another rank.
    #[test]
    fn every_duplicate_is_rejected((lowered, seed) in drawn()) {
        let mut draws = Draws(seed);
        for at in lowered.actions() {
            for rank in [at.rank as usize, draws.below(lowered.placement().ranks() as usize)] {
                let mut lists = lists(&lowered);
                let index = draws.below(lists[rank].len() + 1);
                lists[rank].insert(index, at.action);
                prop_assert!(revalidate(&lowered, lists).is_err(), "{} again at {}:{}", at, rank, index);
            }
        }
    }

    /// Every pair of one rank swapped that is of one kind and stage (an order of sums or of messages), or where one
    /// needs the other. (Other swaps may leave a schedule as good as before.)
    #[test]
    fn every_swap_of_ordered_actions_is_rejected((lowered, _) in drawn()) {
        for rank in 0..lowered.placement().ranks() {
            let list = lowered.list(rank);
            for (i, &a) in list.iter().enumerate() {
                let later: Vec<_> = list.iter().enumerate().skip(i + 1).collect();
                // The nearest of each is the hardest to notice.
                for &(j, &b) in later.iter().filter(|&&(_, &b)| ordered(a, b)).take(3) {
                    let mut lists = lists(&lowered);
                    lists[rank as usize].swap(i, j);
                    prop_assert!(revalidate(&lowered, lists).is_err(), "swapped {} and {}", a, b);
                }
            }
        }
    }

    /// Every action moved to before the nearest one that must come before it, and to behind the nearest that must come after it,
    /// all others in their order. (Waits may come in any order among themselves.)
    #[test]
    fn every_re_timing_across_an_ordered_action_is_rejected((lowered, _) in drawn()) {
        for rank in 0..lowered.placement().ranks() {
            let list = lowered.list(rank);
            for (at, &action) in list.iter().enumerate() {
                let wait = matches!(action.kind, Kind::WaitSend(_) | Kind::WaitRecv(_));
                let before = |a, b| if wait { depends_in_part(a, b) } else { ordered(a, b) };
                let earlier = list[..at].iter().rposition(|&a| before(a, action));
                let later = list[at + 1..].iter().position(|&b| before(action, b)).map(|after| at + 1 + after);
                for to in earlier.into_iter().chain(later) {
                    let mut lists = lists(&lowered);
                    let moved = lists[rank as usize].remove(at);
                    lists[rank as usize].insert(to, moved);
                    prop_assert!(revalidate(&lowered, lists).is_err(), "{} moved to {}", action, to);
                }
            }
        }
    }

    /// What ends in program order ends in batches.
    #[test]
    fn whatever_is_valid_ends_in_batches_too((lowered, _) in drawn()) {
        prop_assert!(validate(lowered.clone(), None).is_ok());
        prop_assert!(ends_in_batches(&lowered));
    }

    /// Random changes of any kind: accepted exactly if the brute-force checker accepts; and what is accepted runs.
    #[test]
    fn the_verdict_is_that_of_brute_force((lowered, seed) in drawn(), changes in 1..3) {
        let mut draws = Draws(seed ^ 0xABCD);
        for _ in 0..4 {
            let mut lists = lists(&lowered);
            for _ in 0..changes {
                let list = &mut lists[draws.below(lowered.placement().ranks() as usize)];
                let (i, near) = (draws.below(list.len()), 1 + draws.below(3));
                let later = (i + near).min(list.len() - 1);
                match draws.below(3) {
                    0 => list.swap(i, later),
                    1 => {
                        let moved = list.remove(i);
                        list.insert(later, moved);
                    }
                    _ => {
                        let moved = list.remove(i);
                        list.insert(i.saturating_sub(near), moved);
                    }
                }
            }
            let (placement, m) = (lowered.placement().clone(), lowered.microbatches());
            let changed = Schedule::new(placement, m, lowered.pass(), lists).unwrap();
            let verdict = validate(changed.clone(), None);
            prop_assert_eq!(verdict.is_ok(), brute_force(&changed), "{:?}\n{}", verdict.err(), changed);
            if let (Ok(program), true) = (verdict, draws.below(8) == 0) {
                equals_sequential(&program);
            }
        }
    }
}
