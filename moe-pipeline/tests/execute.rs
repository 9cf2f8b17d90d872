//! The executor on real threads, over both transports.

mod common;

use common::{Boom, DEADLINE, equals_sequential, run, toys};
use moe_pipeline::generate::{forward_only, gpipe, one_f_one_b};
use moe_pipeline::transport::{buffered, rendezvous};
use moe_pipeline::{Error, ExecuteError, Program, Schedule, lower, validate};

fn program(schedule: Schedule) -> Program {
    validate(lower(&schedule).unwrap(), None).unwrap()
}

#[test]
fn sums_are_those_of_sequential_execution_bit_for_bit() {
    for ranks in 1..=5 {
        for microbatches in [1, 2, 3, 4, 7, 11] {
            for generate in [gpipe, one_f_one_b, forward_only] {
                equals_sequential(&program(generate(ranks, microbatches).unwrap()));
            }
        }
    }
}

#[test]
fn a_failing_stage_ends_every_rank_and_all_learn_the_reason() {
    let program = program(one_f_one_b(4, 6).unwrap());
    for failing in 0..4 {
        for channels in [rendezvous(4, DEADLINE), buffered(4, DEADLINE)] {
            let mut toys = toys(4);
            toys[failing].fail_at = Some(3);
            for (rank, outcome) in run(&program, &toys, channels).into_iter().enumerate() {
                match outcome.unwrap().unwrap_err() {
                    ExecuteError::Stage { at, source } => {
                        assert_eq!(
                            (rank, at.rank as usize, at.action.to_string()),
                            (failing, failing, format!("{failing}F3"))
                        );
                        assert_eq!(source, Boom(3));
                    }
                    ExecuteError::Transport { source: Error::Aborted { peer, why }, .. } => {
                        assert_eq!(peer as usize, failing);
                        assert!(why.contains("boom in micro-batch 3"), "{why}");
                    }
                    other => panic!("rank {rank}: {other}"),
                }
            }
        }
    }
}
