//! Starting the ranks, and gathering what they return.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::comm::{Presence, Shared, ThreadRank};
use crate::board::Board;
use crate::world_error::{BoxError, WorldError, panic_message};

/// Ranks as threads of this process: for tests, for small machines, and to develop what will run on more.
///
/// Ranks share memory, so a message costs one copy. A small operation completes as soon as all of its ranks have
/// started it; a large one is then done by whoever waits for it, also the parts of ranks that do not. A message
/// completes when both sides have started, so that code which runs here does not rely on buffering. Ranks wait without using a core: there may be more of them than cores.
#[derive(Debug)]
pub struct ThreadWorld;

/// A rank that fails leaves the others this long to notice (or the deadline, if that is shorter).
const GRACE: Duration = Duration::from_secs(1);

enum Ended<R> {
    Value(R),
    /// The rank's own error, unless it is only a consequence of another rank's failure.
    Failure(Option<BoxError>),
}

impl ThreadWorld {
    /// Runs `body` once for each of `size` ranks, each in a thread of its own, and returns what they return, in rank
    /// order.
    ///
    /// Ranks wait for each other in operations for at most `deadline`, which therefore has to be longer than the
    /// longest time that one rank may keep the others waiting.
    ///
    /// # Errors
    /// The first failure of the world: a rank that returned an error, panicked, did not arrive in an operation, called
    /// another operation than its peers, or aborted. The others then fail in their current or next operation; this
    /// function returns when they have, and at most a second (or `deadline`, if that is shorter) later. A rank that
    /// does not end is left behind: threads cannot be killed. Ranks that stop outside of any operation are reported
    /// when others have ended and for `deadline` (at most twice that) no rank ended or started an operation; while no
    /// rank has ended, they cannot be told from ranks that compute.
    pub fn run<R, E, F>(size: usize, deadline: Duration, body: F) -> Result<Vec<R>, WorldError>
    where
        R: Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(ThreadRank) -> Result<R, E> + Send + Sync + 'static,
    {
        let shared = Arc::new(Shared::new(Board::new(size, deadline)));
        let body = Arc::new(body);
        let (sender, receiver) = mpsc::channel();
        for rank in 0..size {
            let presence =
                Arc::new(Presence { shared: shared.clone(), rank, aborted: AtomicBool::new(false) });
            let (body, sender) = (body.clone(), sender.clone());
            let started = thread::Builder::new().name(format!("rank {rank}")).spawn(move || {
                let ended = run_rank(&*body, &presence, size);
                // After its failure is recorded: that it left is a consequence.
                drop(presence);
                // The receiver is gone if this rank ended too late.
                let _ = sender.send((rank, ended));
            });
            if let Err(error) = started {
                shared.board.fail(rank, format!("its thread could not be started: {error}"));
                break;
            }
        }
        drop(sender);
        gather(size, &shared, &receiver)
    }
}

fn run_rank<R, E: Into<BoxError>>(
    body: &impl Fn(ThreadRank) -> Result<R, E>,
    presence: &Arc<Presence>,
    size: usize,
) -> Ended<R> {
    let board = &presence.shared.board;
    let rank = ThreadRank::new(presence.clone(), size);
    match catch_unwind(AssertUnwindSafe(|| body(rank))) {
        Ok(Ok(value)) => Ended::Value(value),
        Ok(Err(error)) => {
            let error = error.into();
            let first = board.fail(presence.rank, error.to_string());
            // An abort was the first word of the same failure.
            let own = first || presence.aborted.load(Ordering::Relaxed);
            Ended::Failure(own.then_some(error))
        }
        Err(panic) => {
            board.fail(presence.rank, format!("panicked: {}", panic_message(&*panic)));
            Ended::Failure(None)
        }
    }
}

fn gather<R>(
    size: usize,
    shared: &Shared,
    receiver: &mpsc::Receiver<(usize, Ended<R>)>,
) -> Result<Vec<R>, WorldError> {
    let deadline = shared.board.deadline();
    let mut values: Vec<Option<R>> = (0..size).map(|_| None).collect();
    let mut running: Vec<usize> = (0..size).collect();
    let mut source = None;
    let mut give_up = None;
    let mut arrivals = 0;
    while !running.is_empty() {
        if give_up.is_none() && shared.board.failure().is_some() {
            give_up = Some(Instant::now() + deadline.min(GRACE));
        }
        let patience = give_up.map_or(deadline, |at: Instant| at.saturating_duration_since(Instant::now()));
        match receiver.recv_timeout(patience) {
            Ok((rank, ended)) => {
                running.retain(|&r| r != rank);
                match ended {
                    Ended::Value(value) => values[rank] = Some(value),
                    Ended::Failure(error) => source = source.or(error),
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if give_up.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {
                let before = std::mem::replace(&mut arrivals, shared.board.arrivals());
                if running.len() < size && arrivals == before {
                    let why = format!("ranks {running:?} did not end, and did nothing for {deadline:?}");
                    shared.board.fail(running[0], why);
                }
            }
        }
    }
    match shared.board.failure() {
        Some(failure) => Err(WorldError { failure, source, running }),
        None => Ok(values.into_iter().flatten().collect()),
    }
}
