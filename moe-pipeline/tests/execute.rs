//! The executor on real threads, over both transports.

mod common;

use std::time::Duration;

use common::{
    Boom, DEADLINE, Draws, Outcome, Toy, draw_named, draw_schedule, equals_sequential,
    equals_sequential_with, run, toys, zeros,
};
use moe_pipeline::generate::{
    Named, breadth_first, dual_pipe, dual_pipe_v, forward_only, gpipe, interleaved_1f1b,
    interleaved_zero_bubble, one_f_one_b, overlapped_1f1b, v_half, v_min, zb_h1, zb_h2, zb_v,
};
use moe_pipeline::transport::{Channels, buffered, rendezvous};
use moe_pipeline::{
    Error, ExecuteError, Post, Program, Schedule, Stage, Transport, execute, lower, validate,
};
use proptest::prelude::*;

fn program(schedule: Schedule) -> Program {
    validate(lower(&schedule).unwrap(), None).unwrap()
}

#[test]
fn sums_are_those_of_sequential_execution_bit_for_bit() {
    for ranks in 1..=5 {
        for microbatches in [1, 2, 3, 4, 7, 11] {
            for generate in [gpipe, one_f_one_b, forward_only, zb_h1, zb_h2, zb_v, v_half, v_min] {
                equals_sequential(&program(generate(ranks, microbatches).unwrap()));
            }
            equals_sequential(&program(breadth_first(ranks, 3, microbatches).unwrap()));
            // One group; groups of as many as there are ranks; and a last group that is smaller.
            let rounds = |group: u32| microbatches.next_multiple_of(group);
            for (m, group) in
                [(microbatches, microbatches), (rounds(ranks), ranks), (rounds(ranks + 1) + ranks, ranks + 1)]
            {
                for v in 1..=2 {
                    for generate in [interleaved_1f1b, interleaved_zero_bubble, overlapped_1f1b] {
                        equals_sequential(&program(generate(ranks, v, m, Some(group)).unwrap()));
                    }
                }
            }
            equals_sequential(&program(dual_pipe_v(ranks, 2 * ranks + microbatches).unwrap()));
            // Both copies of the weights get their own micro-batches' sums.
            if ranks % 2 == 0 {
                equals_sequential(&program(dual_pipe(ranks, 2 * (ranks + microbatches)).unwrap()));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any placement and order, stages that take unequal time.
    #[test]
    fn any_schedule_gives_the_same_bits(p in 1_u32..=8, extra in 0_u32..=8, m in 1_u32..=16, seed: u64) {
        equals_sequential_with(&program(draw_schedule(p, extra, m, &mut Draws(seed))), Some(seed));
    }

    /// Every published schedule, over transports that take unequal time as well.
    #[test]
    fn every_named_schedule_gives_the_same_bits(
        named in prop::sample::select(Named::ALL.to_vec()),
        p in 1_u32..=4,
        v in 1_u32..=3,
        m in 1_u32..=6,
        seed: u64,
    ) {
        let schedule = draw_named(named, p, v, m, &mut Draws(seed));
        equals_sequential_with(&program(schedule), Some(seed));
    }
}

const RANKS: u32 = 4;

fn both(deadline: Duration) -> [Vec<Channels<Vec<f64>>>; 2] {
    [rendezvous(RANKS, deadline), buffered(RANKS, deadline)]
}

/// 1F1B on four ranks, six micro-batches, with a change to one stage.
fn run_with(
    channels: Vec<Channels<Vec<f64>>>,
    stage: usize,
    change: impl Fn(&mut Toy),
) -> Vec<Option<Outcome>> {
    let mut toys = toys(RANKS);
    change(&mut toys[stage]);
    run(&program(one_f_one_b(RANKS, 6).unwrap()), &toys, channels)
}

#[test]
fn a_failing_stage_ends_every_rank_and_all_learn_the_reason() {
    for failing in 0..RANKS {
        for m in [0, 3, 5] {
            for channels in both(DEADLINE) {
                let outcomes = run_with(channels, failing as usize, |toy| toy.fail_at = Some(m));
                for (rank, outcome) in (0..).zip(outcomes) {
                    match outcome.unwrap().unwrap_err() {
                        ExecuteError::Stage { at, source } => {
                            assert_eq!(
                                (rank, at.rank, at.action.to_string()),
                                (failing, failing, format!("{failing}F{m}"))
                            );
                            assert_eq!(source, Boom(m));
                        }
                        ExecuteError::Transport { at, source: Error::Aborted { peer, why } } => {
                            assert_eq!((at.rank, peer), (rank, failing));
                            assert!(why.contains(&format!("{failing}F{m} (rank {failing}, ")), "{why}");
                            assert!(why.contains(&format!("boom in micro-batch {m}")), "{why}");
                        }
                        other => panic!("rank {rank}: {other}"),
                    }
                }
            }
        }
    }
}

#[test]
fn a_panicking_rank_ends_every_rank_and_is_named() {
    for dead in 0..RANKS {
        for channels in both(DEADLINE) {
            let outcomes = run_with(channels, dead as usize, |toy| toy.panic_at = Some(2));
            for (rank, outcome) in (0..).zip(outcomes) {
                let Some(outcome) = outcome else {
                    assert_eq!(rank, dead);
                    continue;
                };
                let error = outcome.unwrap_err().to_string();
                assert!(error.contains(&format!("rank {dead} is gone")), "rank {rank}: {error}");
            }
        }
    }
}

#[test]
fn a_rank_that_never_starts_ends_every_rank() {
    for silent in 0..RANKS {
        for mut channels in both(Duration::from_millis(100)) {
            let program = program(one_f_one_b(RANKS, 6).unwrap());
            let _alive = channels.remove(silent as usize);
            let errors: Vec<String> = std::thread::scope(|scope| {
                let others = (0..RANKS).filter(|&rank| rank != silent).zip(channels);
                let ranks: Vec<_> = others
                    .map(|(rank, mut transport)| {
                        let (program, toy) = (&program, toys(RANKS)[rank as usize].clone());
                        scope.spawn(move || {
                            execute(program, rank, &[toy], &mut transport, &mut zeros(RANKS))
                                .unwrap_err()
                                .to_string()
                        })
                    })
                    .collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            // Whoever's deadline ends first tells the others, who give its reason.
            assert!(errors.iter().all(|e| e.contains("waited 100ms for rank")), "{errors:?}");
        }
    }
}

#[test]
fn a_rank_that_stalls_ends_with_the_others() {
    for stalling in 0..RANKS {
        for channels in both(Duration::from_millis(40)) {
            let outcomes = run_with(channels, stalling as usize, |toy| {
                toy.stall_at = Some((2, Duration::from_millis(400)))
            });
            for outcome in outcomes {
                match outcome.unwrap().unwrap_err() {
                    ExecuteError::Transport {
                        source: Error::Aborted { .. } | Error::Timeout { .. }, ..
                    } => {}
                    other => panic!("{other}"),
                }
            }
        }
    }
}

#[test]
fn a_rank_is_given_its_own_stages() {
    let program = program(one_f_one_b(2, 3).unwrap());
    let mut channels: Vec<Channels<Vec<f64>>> = buffered(2, DEADLINE);
    let mut call =
        |rank, stages: &[Toy]| execute(&program, rank, stages, &mut channels[0], &mut zeros(2)).unwrap_err();
    assert_eq!(call(2, &toys(1)), ExecuteError::UnknownRank { rank: 2, ranks: 2 });
    assert_eq!(call(1, &toys(2)), ExecuteError::StageCount { rank: 1, expected: 1, got: 2 });
    assert_eq!(call(0, &[]), ExecuteError::StageCount { rank: 0, expected: 1, got: 0 });
}

/// Returns an activation forward and a gradient backward, or not, wherever it stands.
struct Careless {
    forward: bool,
    backward: bool,
}

impl Stage for Careless {
    type Cx = ();
    type Act = u8;
    type Saved = ();
    type Deferred = ();
    type Error = Boom;

    fn forward(&self, _: u32, _: Option<u8>, _: &mut ()) -> Result<(Option<u8>, ()), Boom> {
        Ok((self.forward.then_some(1), ()))
    }

    fn backward_input(&self, _: u32, _: Option<u8>, _: (), _: &mut ()) -> Result<(Option<u8>, ()), Boom> {
        Ok((self.backward.then_some(2), ()))
    }

    fn backward_weight(&self, _: u32, _: (), _: &mut ()) -> Result<(), Boom> {
        Ok(())
    }
}

/// Notes which forward pass of which micro-batch it was asked for.
struct Noting;

impl Stage for Noting {
    type Cx = Vec<(&'static str, u32)>;
    type Act = ();
    type Saved = ();
    type Deferred = ();
    type Error = Boom;

    fn forward(&self, m: u32, _: Option<()>, cx: &mut Self::Cx) -> Result<(Option<()>, ()), Boom> {
        cx.push(("to go back", m));
        Ok((None, ()))
    }

    fn forward_only(&self, m: u32, _: Option<()>, cx: &mut Self::Cx) -> Result<Option<()>, Boom> {
        cx.push(("only", m));
        Ok(None)
    }

    fn backward_input(
        &self,
        _: u32,
        _: Option<()>,
        _: (),
        _: &mut Self::Cx,
    ) -> Result<(Option<()>, ()), Boom> {
        Ok((None, ()))
    }

    fn backward_weight(&self, _: u32, _: (), _: &mut Self::Cx) -> Result<(), Boom> {
        Ok(())
    }
}

#[test]
fn stages_know_whether_they_go_back() {
    for (schedule, pass) in [(forward_only(1, 2), "only"), (one_f_one_b(1, 2), "to go back")] {
        let (mut seen, mut transport) = (Vec::new(), buffered(1, DEADLINE).remove(0));
        execute(&program(schedule.unwrap()), 0, &[Noting], &mut transport, &mut seen).unwrap();
        assert_eq!(seen, [(pass, 0), (pass, 1)]);
    }
}

/// Logs what it is asked, and answers as it is told.
#[derive(Default)]
struct Scripted {
    log: Vec<String>,
    lose_tickets: bool,
    confuse: bool,
}

impl Transport<u8> for Scripted {
    type Ticket = bool;
    type Error = Boom;

    fn post(&mut self, batch: Vec<Post<u8>>) -> Result<Vec<bool>, Boom> {
        let name = |post: &Post<u8>| match post {
            Post::Send { to_rank, message, act } => format!("{act} to {to_rank}: {message}"),
            Post::Recv { from_rank, message } => format!("from {from_rank}: {message}"),
        };
        self.log.push(batch.iter().map(name).collect::<Vec<_>>().join(" + "));
        let receives = batch.iter().map(|post| matches!(post, Post::Recv { .. }));
        Ok(receives.skip(usize::from(self.lose_tickets)).collect())
    }

    fn wait(&mut self, receive: bool) -> Result<Option<u8>, Boom> {
        self.log.push(if receive { "arrived" } else { "sent" }.to_owned());
        Ok((receive != self.confuse).then_some(7))
    }

    fn abort(&mut self, why: &str) {
        self.log.push(format!("abort: {why}"));
    }
}

#[test]
fn neighbouring_messages_are_posted_together() {
    let program = program(one_f_one_b(3, 2).unwrap());
    let mut transport = Scripted::default();
    execute(&program, 0, &[Careless { forward: true, backward: false }], &mut transport, &mut ()).unwrap();
    assert_eq!(
        transport.log,
        [
            "1 to 1: activation for stage 1 of micro-batch 0",
            "sent",
            "1 to 1: activation for stage 1 of micro-batch 1 + from 1: gradient for stage 0 of micro-batch 0",
            "arrived",
            "from 1: gradient for stage 0 of micro-batch 1",
            "arrived",
            "sent",
        ]
    );
}

#[test]
fn outputs_are_there_exactly_where_a_neighbour_is() {
    let program = program(gpipe(3, 1).unwrap());
    for (rank, forward, backward, fault) in [
        (0, false, false, Some(("0F0", true))),
        (0, true, true, Some(("0B0", false))),
        (0, true, false, None),
        (1, false, true, Some(("1F0", true))),
        (1, true, false, Some(("1B0", true))),
        (1, true, true, None),
        (2, true, true, Some(("2F0", false))),
        (2, false, false, Some(("2B0", true))),
        (2, false, true, None),
    ] {
        let mut transport = Scripted::default();
        let result = execute(&program, rank, &[Careless { forward, backward }], &mut transport, &mut ());
        match (result, fault) {
            (Ok(()), None) => {}
            (Err(error @ ExecuteError::Output { at, expected }), Some(fault)) => {
                assert_eq!((at.action.to_string().as_str(), expected), fault);
                assert_eq!(transport.log.last(), Some(&format!("abort: {error}")));
            }
            (other, _) => panic!("rank {rank}, {forward}, {backward}: {other:?}"),
        }
    }
}

#[test]
fn a_transport_that_breaks_its_contract_is_an_error() {
    let training = program(gpipe(2, 1).unwrap());
    let run = |rank, lose_tickets, confuse| {
        let mut transport = Scripted { lose_tickets, confuse, ..Default::default() };
        let stage = Careless { forward: rank == 0, backward: rank == 1 };
        execute(&training, rank, &[stage], &mut transport, &mut ()).unwrap_err().to_string()
    };
    assert_eq!(
        run(0, true, false),
        "0RECV_B0 (rank 0, index 2): the transport returned another number of tickets than of messages"
    );
    assert_eq!(
        run(1, false, true),
        "1WAIT_RECV_F0 (rank 1, index 1): the transport returned nothing for a receive"
    );
    assert_eq!(
        run(0, false, true),
        "0WAIT_RECV_B0 (rank 0, index 3): the transport returned nothing for a receive"
    );
    let evaluation = program(forward_only(2, 1).unwrap());
    let mut transport = Scripted { confuse: true, ..Default::default() };
    let error =
        execute(&evaluation, 0, &[Careless { forward: true, backward: false }], &mut transport, &mut ())
            .unwrap_err();
    assert_eq!(error.to_string(), "0WAIT_SEND_F0 (rank 0, index 2): the transport returned data for a send");
}
