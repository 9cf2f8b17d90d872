//! Runs one rank's part of a validated program.

use std::collections::HashMap;
use std::fmt::Display;

use crate::{Action, At, Kind, Message, Pass, Post, Program, Schedule, Stage, Transport};

/// Why a rank could not run its part. `S` is the stages' error, `T` the transport's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError<S, T> {
    /// A rank beyond the program's.
    #[error("there is no rank {rank} in a pipeline of {ranks}")]
    UnknownRank {
        /// The rank asked for.
        rank: u32,
        /// Ranks of the program.
        ranks: u32,
    },
    /// A rank is given its own stages, in ascending order.
    #[error("rank {rank} was given {got} stages and owns {expected}")]
    StageCount {
        /// The rank.
        rank: u32,
        /// Stages it owns.
        expected: usize,
        /// Stages given.
        got: usize,
    },
    /// A stage failed.
    #[error("{at}: {source}")]
    Stage {
        /// The action that failed.
        at: At,
        /// The stage's reason.
        source: S,
    },
    /// A stage returned no output where the next stage needs one, or one where there is no next stage.
    #[error("{at}: the stage {}", if *.expected { "returned nothing for its neighbour" }
        else { "returned an output, but has no neighbour" })]
    Output {
        /// The action.
        at: At,
        /// Whether an output was needed.
        expected: bool,
    },
    /// The transport failed.
    #[error("{at}: {source}")]
    Transport {
        /// The action that failed; of a batch of messages, the last.
        at: At,
        /// The transport's reason.
        source: T,
    },
    /// The transport returned something else than its contract says: a ticket too few, or a receive with nothing in it.
    #[error("{at}: the transport returned {returned}")]
    Contract {
        /// The action.
        at: At,
        /// What came back.
        returned: &'static str,
    },
}

/// Runs `rank`'s part of `program`: `stages` are those it owns, ascending; `cx` is lent to each of their calls.
///
/// The two parts of an overlap are one call, [`Stage::overlap`].
///
/// Returns when the rank has done all its actions. On an error it aborts the transport, so that its peers end too; their
/// error then says why. A rank that panics tells its peers by dropping its transport.
///
/// # Errors
/// Stages that are not the rank's, the first failure of a stage or of the transport, with the action it happened at.
pub fn execute<S, T>(
    program: &Program,
    rank: u32,
    stages: &[S],
    transport: &mut T,
    cx: &mut S::Cx,
) -> Result<(), ExecuteError<S::Error, T::Error>>
where
    S: Stage,
    T: Transport<S::Act>,
    S::Error: Display,
    T::Error: Display,
{
    let schedule = program.schedule();
    let result = Run::new(schedule, rank, stages, transport, cx).and_then(Run::run);
    if let Err(error) = &result {
        transport.abort(&error.to_string());
    }
    result
}

type Outcome<R, S, T> =
    Result<R, ExecuteError<<S as Stage>::Error, <T as Transport<<S as Stage>::Act>>::Error>>;

/// What a rank holds between two actions.
struct Run<'a, S: Stage, T: Transport<S::Act>> {
    schedule: &'a Schedule,
    rank: u32,
    stages: &'a [S],
    transport: &'a mut T,
    cx: &'a mut S::Cx,
    saved: HashMap<(u32, u32), S::Saved>,
    deferred: HashMap<(u32, u32), S::Deferred>,
    /// Made here, to be sent.
    outbox: HashMap<Message, S::Act>,
    /// Received or made here, to be used here.
    inbox: HashMap<Message, S::Act>,
    tickets: HashMap<Message, T::Ticket>,
    /// Neighbouring sends and receives, posted together.
    batch: Vec<Post<S::Act>>,
    batch_messages: Vec<Message>,
}

const VALID: &str = "the validator has seen it made before it is used";

impl<'a, S: Stage, T: Transport<S::Act>> Run<'a, S, T> {
    fn new(
        schedule: &'a Schedule,
        rank: u32,
        stages: &'a [S],
        transport: &'a mut T,
        cx: &'a mut S::Cx,
    ) -> Outcome<Self, S, T> {
        let ranks = schedule.placement().ranks();
        if rank >= ranks {
            return Err(ExecuteError::UnknownRank { rank, ranks });
        }
        let expected = schedule.placement().stages_of(rank).len();
        if stages.len() != expected {
            return Err(ExecuteError::StageCount { rank, expected, got: stages.len() });
        }
        Ok(Run {
            schedule,
            rank,
            stages,
            transport,
            cx,
            saved: HashMap::new(),
            deferred: HashMap::new(),
            outbox: HashMap::new(),
            inbox: HashMap::new(),
            tickets: HashMap::new(),
            batch: Vec::new(),
            batch_messages: Vec::new(),
        })
    }

    fn run(mut self) -> Outcome<(), S, T> {
        let mut last = None;
        for (index, &action) in self.schedule.list(self.rank).iter().enumerate() {
            let at = At { rank: self.rank, index, action };
            if let Some(last) = last
                && !matches!(action.kind, Kind::Send(_) | Kind::Recv(_))
            {
                self.flush(last)?;
            }
            self.step(at)?;
            last = Some(at);
        }
        last.map_or(Ok(()), |last| self.flush(last))
    }

    fn step(&mut self, at: At) -> Outcome<(), S, T> {
        match at.action.kind {
            Kind::Forward => self.forward(at),
            Kind::BackwardInput => self.backward_input(at),
            Kind::BackwardWeight => self.backward_weight(at),
            Kind::Backward => self.backward(at),
            Kind::Overlap { stage, microbatch } => {
                self.overlap(at, Action::new(stage, Kind::Backward, microbatch))
            }
            Kind::Send(_) => {
                let message = self.message(at.action);
                let act = self.outbox.remove(&message).expect(VALID);
                let to_rank = self.schedule.placement().ends(message).1;
                self.collect(message, Post::Send { to_rank, message, act });
                Ok(())
            }
            Kind::Recv(_) => {
                let message = self.message(at.action);
                let from_rank = self.schedule.placement().ends(message).0;
                self.collect(message, Post::Recv { from_rank, message });
                Ok(())
            }
            Kind::WaitSend(_) => match self.wait(at)? {
                None => Ok(()),
                Some(_) => Err(ExecuteError::Contract { at, returned: "data for a send" }),
            },
            Kind::WaitRecv(_) => match self.wait(at)? {
                Some(act) => {
                    self.inbox.insert(self.message(at.action), act);
                    Ok(())
                }
                None => Err(ExecuteError::Contract { at, returned: "nothing for a receive" }),
            },
        }
    }

    fn forward(&mut self, at: At) -> Outcome<(), S, T> {
        let Action { microbatch: m, stage, .. } = at.action;
        let x = self.input(at.action);
        let failed = |source| ExecuteError::Stage { at, source };
        let y = match self.schedule.pass() {
            Pass::ForwardBackward => {
                let (y, saved) = self.stage(stage).forward(m, x, self.cx).map_err(failed)?;
                self.saved.insert((stage, m), saved);
                y
            }
            Pass::ForwardOnly => self.stage(stage).forward_only(m, x, self.cx).map_err(failed)?,
        };
        self.output(at, y)
    }

    fn backward(&mut self, at: At) -> Outcome<(), S, T> {
        let Action { microbatch: m, stage, .. } = at.action;
        let dy = self.input(at.action);
        let saved = self.saved.remove(&(stage, m)).expect(VALID);
        let dx = self
            .stage(stage)
            .backward(m, dy, saved, self.cx)
            .map_err(|source| ExecuteError::Stage { at, source })?;
        self.output(at, dx)
    }

    /// The `F` of the overlap at `at`, woven with the `B` `backward`.
    fn overlap(&mut self, at: At, backward: Action) -> Outcome<(), S, T> {
        let forward = Action { kind: Kind::Forward, ..at.action };
        let (x, dy) = (self.input(forward), self.input(backward));
        let saved = self.saved.remove(&(backward.stage, backward.microbatch)).expect(VALID);
        let (stage, back) = (self.stage(forward.stage), self.stage(backward.stage));
        let ((y, saved), dx) = stage
            .overlap((forward.microbatch, x), back, (backward.microbatch, dy, saved), self.cx)
            .map_err(|source| ExecuteError::Stage { at, source })?;
        self.saved.insert((forward.stage, forward.microbatch), saved);
        self.output(At { action: forward, ..at }, y)?;
        self.output(At { action: backward, ..at }, dx)
    }

    fn backward_input(&mut self, at: At) -> Outcome<(), S, T> {
        let Action { microbatch: m, stage, .. } = at.action;
        let dy = self.input(at.action);
        let saved = self.saved.remove(&(stage, m)).expect(VALID);
        let (dx, deferred) = self
            .stage(stage)
            .backward_input(m, dy, saved, self.cx)
            .map_err(|source| ExecuteError::Stage { at, source })?;
        self.deferred.insert((stage, m), deferred);
        self.output(at, dx)
    }

    fn backward_weight(&mut self, at: At) -> Outcome<(), S, T> {
        let Action { microbatch: m, stage, .. } = at.action;
        let deferred = self.deferred.remove(&(stage, m)).expect(VALID);
        self.stage(stage)
            .backward_weight(m, deferred, self.cx)
            .map_err(|source| ExecuteError::Stage { at, source })
    }

    fn stage(&self, stage: u32) -> &'a S {
        &self.stages[self.schedule.placement().local(stage)]
    }

    fn message(&self, action: Action) -> Message {
        action.message(self.schedule.placement()).expect("a validated message crosses a boundary")
    }

    fn input(&mut self, action: Action) -> Option<S::Act> {
        let input = action.input(self.schedule.placement())?;
        Some(self.inbox.remove(&input).expect(VALID))
    }

    fn output(&mut self, at: At, made: Option<S::Act>) -> Outcome<(), S, T> {
        match (at.action.output(self.schedule.placement()), made) {
            (Some(output), Some(act)) => {
                let (from, to) = self.schedule.placement().ends(output);
                if from == to { &mut self.inbox } else { &mut self.outbox }.insert(output, act);
                Ok(())
            }
            (None, None) => Ok(()),
            (output, _) => Err(ExecuteError::Output { at, expected: output.is_some() }),
        }
    }

    fn collect(&mut self, message: Message, post: Post<S::Act>) {
        self.batch.push(post);
        self.batch_messages.push(message);
    }

    /// Posts what was collected; `at` is the last of it.
    fn flush(&mut self, at: At) -> Outcome<(), S, T> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let tickets = self
            .transport
            .post(std::mem::take(&mut self.batch))
            .map_err(|source| ExecuteError::Transport { at, source })?;
        if tickets.len() != self.batch_messages.len() {
            return Err(ExecuteError::Contract {
                at,
                returned: "another number of tickets than of messages",
            });
        }
        self.tickets.extend(self.batch_messages.drain(..).zip(tickets));
        Ok(())
    }

    fn wait(&mut self, at: At) -> Outcome<Option<S::Act>, S, T> {
        let ticket = self.tickets.remove(&self.message(at.action)).expect(VALID);
        self.transport.wait(ticket).map_err(|source| ExecuteError::Transport { at, source })
    }
}
