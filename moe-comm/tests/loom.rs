//! Every interleaving of the board, up to a bound on preemptions:
//! `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test -p moe-comm --release --test loom`.
#![cfg(loom)]

use std::sync::Arc;
use std::time::Duration;

use loom::thread;
use moe_comm::board::{Board, Job, Lane, Members, Seat, Ticket};
use moe_comm::{Error, Result};
use moe_topology::{Attention, GroupKey};

/// A sum. `small` work is done by the last to arrive, other work is shared.
struct Sum {
    parties: Vec<(Kind, Arc<u64>)>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Kind {
    op: &'static str,
    small: bool,
}

const SMALL: Kind = Kind { op: "sum", small: true };
const LARGE: Kind = Kind { op: "sum", small: false };

impl Job for Sum {
    type Note = Kind;
    type Give = Arc<u64>;
    type Take = u64;

    fn group(_: &Kind) -> GroupKey {
        Attention::ALL.into()
    }
    fn name(note: &Kind) -> &'static str {
        note.op
    }
    fn agree(mine: (usize, &Kind), theirs: (usize, &Kind)) -> bool {
        mine.0 != theirs.0 && mine.1 == theirs.1
    }
    fn describe(note: &Kind) -> String {
        note.op.into()
    }
    fn join(parties: Vec<(Kind, Arc<u64>)>) -> Self {
        Sum { parties }
    }
    fn is_small(&self) -> bool {
        self.parties[0].0.small
    }
    fn fill(&self, index: usize, take: &mut u64) -> Result<()> {
        *take += self.parties.iter().map(|(_, give)| **give).sum::<u64>() * 10 + index as u64;
        Ok(())
    }
}

/// The deadline never comes: the clock stands still in the model. What a waiter does then is `Board::fail`.
fn board(size: usize) -> Arc<Board<Sum>> {
    Arc::new(Board::new(size, Duration::from_secs(3600)))
}

fn seat(size: usize, index: usize, sequence: u64) -> Seat {
    let ranks = (0..size).collect();
    let group = Arc::new(Members { id: 0, ranks });
    Seat { group, lane: Lane::All, sequence, index }
}

fn arrive(
    board: &Arc<Board<Sum>>,
    kind: Kind,
    size: usize,
    rank: usize,
    sequence: u64,
) -> Result<(Ticket<Sum>, Arc<u64>)> {
    let give = Arc::new(1 + rank as u64);
    let ticket = board.arrive(&seat(size, rank, sequence), kind, give.clone(), 0)?;
    Ok((ticket, give))
}

/// Arrives, waits, and checks that what was given has been let go.
fn join(board: &Arc<Board<Sum>>, kind: Kind, size: usize, rank: usize, sequence: u64) -> Result<u64> {
    let (ticket, give) = arrive(board, kind, size, rank, sequence)?;
    let sum = ticket.wait()?;
    assert_eq!(Arc::strong_count(&give), 1, "the gift is still held after `wait`");
    Ok(sum)
}

fn expected(size: usize, rank: usize) -> u64 {
    (1..=size as u64).sum::<u64>() * 10 + rank as u64
}

/// Runs `others` for ranks 1… in threads of their own, and `first` here for rank 0.
fn ranks(size: usize, body: impl Fn(usize) + Send + Sync + Copy + 'static) {
    let others: Vec<_> = (1..size).map(|rank| thread::spawn(move || body(rank))).collect();
    body(0);
    for other in others {
        other.join().unwrap();
    }
}

macro_rules! share {
    ($board:ident, $body:expr) => {{
        let $board: &'static Arc<Board<Sum>> = Box::leak(Box::new($board));
        $body
    }};
}

fn all_sum(size: usize, kind: Kind, rounds: u64) {
    loom::model(move || {
        let board = board(size);
        share!(
            board,
            ranks(size, move |rank| {
                for sequence in 0..rounds {
                    assert_eq!(join(board, kind, size, rank, sequence), Ok(expected(size, rank)));
                }
            })
        );
    });
}

#[test]
fn two_ranks_small() {
    all_sum(2, SMALL, 2);
}

#[test]
fn two_ranks_sharing_work() {
    all_sum(2, LARGE, 2);
}

#[test]
fn three_ranks_small() {
    all_sum(3, SMALL, 1);
}

#[test]
fn three_ranks_sharing_work() {
    all_sum(3, LARGE, 1);
}

#[test]
fn awaited_crosswise() {
    loom::model(|| {
        let board = board(2);
        share!(
            board,
            ranks(2, move |rank| {
                let (first, _) = arrive(board, LARGE, 2, rank, 0).unwrap();
                let (second, _) = arrive(board, SMALL, 2, rank, 1).unwrap();
                let (a, b) = if rank == 0 { (first, second) } else { (second, first) };
                assert_eq!(a.wait(), Ok(expected(2, rank)));
                assert_eq!(b.wait(), Ok(expected(2, rank)));
            })
        );
    });
}

/// Whoever asks learns that all is done when it is, and not before; who asks does not keep others from the work.
#[test]
fn asked_and_awaited() {
    for kind in [SMALL, LARGE] {
        loom::model(move || {
            let board = board(2);
            share!(
                board,
                ranks(2, move |rank| {
                    let (ticket, give) = arrive(board, kind, 2, rank, 0).unwrap();
                    if ticket.ready().unwrap() {
                        assert_eq!(Arc::strong_count(&give), 1, "the gift is still held when all is done");
                    }
                    assert_eq!(ticket.wait(), Ok(expected(2, rank)));
                })
            );
        });
    }
}

/// Messages in both directions beside an operation of the group.
#[test]
fn messages_in_lanes_of_their_own() {
    loom::model(|| {
        let board = board(2);
        share!(
            board,
            ranks(2, move |rank| {
                let message = |from: usize| {
                    let lane = Lane::Pair(from, 1 - from);
                    let index = usize::from(rank != from);
                    let seat = Seat { lane, index, ..seat(2, rank, 0) };
                    (board.arrive(&seat, SMALL, Arc::new(1 + from as u64), 0).unwrap(), index as u64)
                };
                let (out, back) = (message(0), message(1));
                assert_eq!(join(board, SMALL, 2, rank, 0), Ok(expected(2, rank)));
                for (from, (ticket, index)) in [out, back].into_iter().enumerate() {
                    assert_eq!(ticket.wait(), Ok(2 * (1 + from as u64) * 10 + index));
                }
            })
        );
    });
}

/// A rank that has started and does not wait stalls nobody.
#[test]
fn dropped_tickets() {
    for kind in [SMALL, LARGE] {
        loom::model(move || {
            let board = board(3);
            share!(
                board,
                ranks(3, move |rank| {
                    let (ticket, _give) = arrive(board, kind, 3, rank, 0).unwrap();
                    if rank == 1 {
                        drop(ticket);
                    } else {
                        assert_eq!(ticket.wait(), Ok(expected(3, rank)));
                    }
                })
            );
        });
    }
}

fn is_failure_of_2(error: &Error) -> bool {
    matches!(error, Error::Poisoned { rank: 2, why, .. } if &**why == "stopped")
}

/// A failure comes at any moment: ranks have the right result or that failure, and it lasts.
#[test]
fn a_failure_races_with_arrivals() {
    for kind in [SMALL, LARGE] {
        loom::model(move || {
            let board = board(3);
            share!(
                board,
                ranks(3, move |rank| {
                    if rank == 2 {
                        assert!(board.fail(2, "stopped".into()));
                        return;
                    }
                    match join(board, kind, 2, rank, 0) {
                        Ok(sum) => assert_eq!(sum, expected(2, rank)),
                        Err(error) => {
                            assert!(is_failure_of_2(&error), "{error}");
                            assert_eq!(join(board, kind, 2, rank, 1), Err(error));
                        }
                    }
                })
            );
        });
    }
}

/// The same while a rank is missing for good: nobody hangs.
#[test]
fn a_failure_wakes_who_waits() {
    loom::model(|| {
        let board = board(3);
        share!(
            board,
            ranks(3, move |rank| {
                if rank == 2 {
                    board.fail(2, "stopped".into());
                } else {
                    assert!(is_failure_of_2(&join(board, LARGE, 3, rank, 0).unwrap_err()));
                }
            })
        );
    });
}

/// Two ranks fail at once: one failure is the first, and all are told that one.
#[test]
fn the_first_failure_is_the_only_one() {
    loom::model(|| {
        let board = board(3);
        share!(
            board,
            ranks(3, move |rank| {
                if rank == 0 {
                    let Err(Error::Poisoned { rank, .. }) = join(board, SMALL, 3, 0, 0) else {
                        panic!("it joined alone")
                    };
                    assert!(rank == 1 || rank == 2);
                } else {
                    let first = board.fail(rank, "stopped".into());
                    let Some(Error::Poisoned { rank: failed, .. }) = board.failure() else {
                        panic!("no failure")
                    };
                    assert_eq!(first, failed == rank);
                }
            })
        );
    });
}

#[test]
fn a_rank_leaves_instead_of_arriving() {
    loom::model(|| {
        let board = board(2);
        share!(
            board,
            ranks(2, move |rank| {
                if rank == 1 {
                    board.leave(1);
                } else {
                    let error = join(board, SMALL, 2, 0, 0).unwrap_err();
                    assert!(matches!(error, Error::Poisoned { rank: 1, .. }), "{error}");
                }
            })
        );
    });
}

#[test]
fn ranks_that_disagree() {
    loom::model(|| {
        let board = board(2);
        share!(
            board,
            ranks(2, move |rank| {
                let kind = if rank == 0 { SMALL } else { Kind { op: "product", ..SMALL } };
                let error = join(board, kind, 2, rank, 0).unwrap_err().to_string();
                assert!(
                    error.contains("rank 0 calls sum") && error.contains("rank 1 calls product"),
                    "{error}"
                );
            })
        );
    });
}
