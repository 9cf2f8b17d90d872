//! What each rank does in which order.

use std::ops::Range;

use crate::{Action, At, Error, Flow, Kind, Message, Placement, Result};

/// What a schedule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Training: every micro-batch goes forward and backward through every stage.
    ForwardBackward,
    /// Evaluation: every micro-batch goes forward; nothing is kept.
    ForwardOnly,
}

/// A list of actions per rank. Made by a generator or from text with compute actions only; [`lower`](crate::lower) adds
/// the messages; [`validate`](crate::validate) turns it into what can run.
///
/// Every action names an existing stage of its rank and an existing micro-batch, and every message crosses a boundary
/// between two ranks; whether the order is right is the validator's question.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Schedule {
    placement: Placement,
    microbatches: u32,
    pass: Pass,
    lists: Vec<Vec<Action>>,
}

impl Schedule {
    /// A schedule from its lists, `lists[rank]` in program order.
    ///
    /// # Errors
    /// No micro-batch, a list too many or too few, fewer actions than forward passes, or an action that cannot be where
    /// it stands.
    pub fn new(placement: Placement, microbatches: u32, pass: Pass, lists: Vec<Vec<Action>>) -> Result<Self> {
        if microbatches == 0 {
            return Err(Error::Empty { what: "micro-batch" });
        }
        if lists.len() != placement.ranks() as usize {
            return Err(Error::Lists { lists: lists.len(), ranks: placement.ranks() });
        }
        let actions = lists.iter().map(Vec::len).sum();
        let stages = placement.stages();
        // So a table of all messages is never much longer than the schedule, whatever numbers a text names.
        if (actions as u64) < u64::from(placement.length()) * u64::from(microbatches) {
            return Err(Error::TooFewActions { actions, stages, microbatches });
        }
        let schedule = Schedule { placement, microbatches, pass, lists };
        schedule.actions().try_for_each(|at| schedule.check(at))?;
        Ok(schedule)
    }

    fn check(&self, at: At) -> Result<()> {
        at.action.parts().try_for_each(|action| self.check_part(At { action, ..at }))
    }

    fn check_part(&self, at: At) -> Result<()> {
        let stages = self.placement.stages();
        let action = at.action;
        let owner = self.placement.rank_of(action.stage).ok_or(Error::UnknownStage { at, stages })?;
        if owner != at.rank {
            return Err(Error::WrongRank { at, owner });
        }
        let all = self.microbatches;
        if action.microbatch >= all {
            return Err(Error::UnknownMicrobatch { at, microbatches: all });
        }
        let own = self.microbatches_of(action.stage);
        if !own.contains(&action.microbatch) {
            return Err(Error::OtherCopy { at, first: own.start, end: own.end });
        }
        let backward = match action.kind {
            Kind::Forward => false,
            Kind::BackwardInput | Kind::BackwardWeight | Kind::Backward | Kind::Overlap { .. } => true,
            Kind::Send(flow) | Kind::Recv(flow) | Kind::WaitSend(flow) | Kind::WaitRecv(flow) => {
                let message = action.message(&self.placement).ok_or(Error::NoBoundary { at })?;
                let (from, to) = self.placement.ends(message);
                if from == to {
                    return Err(Error::NoBoundary { at });
                }
                flow == Flow::Backward
            }
        };
        match self.pass {
            Pass::ForwardOnly if backward => Err(Error::ForwardOnly { at }),
            _ => Ok(()),
        }
    }

    /// Who owns which stage.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Micro-batches of a step.
    pub fn microbatches(&self) -> u32 {
        self.microbatches
    }

    /// The micro-batches that go through `stage`: all of them, or the share of the stage's copy of the pipeline. Copies take
    /// consecutive, equal shares, to within one micro-batch. Empty beyond the last stage.
    pub fn microbatches_of(&self, stage: u32) -> Range<u32> {
        match stage < self.placement.stages() {
            true => self.placement.microbatches_of(stage, self.microbatches),
            false => 0..0,
        }
    }

    /// Training or evaluation.
    pub fn pass(&self) -> Pass {
        self.pass
    }

    /// The actions of `rank` in program order; empty beyond the last rank.
    pub fn list(&self, rank: u32) -> &[Action] {
        self.lists.get(rank as usize).map_or(&[], Vec::as_slice)
    }

    /// Every action with its place, rank after rank.
    pub fn actions(&self) -> impl Iterator<Item = At> {
        (0..).zip(&self.lists).flat_map(|(rank, list)| {
            list.iter().enumerate().map(move |(index, &action)| At { rank, index, action })
        })
    }

    /// The same schedule with every overlap taken apart, `F` before `B`: for executors and tools that know none. With what
    /// hides behind what, its benefit is gone; order and results are the same.
    ///
    /// # Errors
    /// A schedule with messages: those of `F` would come after `B`.
    pub fn serial(&self) -> Result<Self> {
        match self.actions().find(|at| !at.action.kind.is_compute()) {
            Some(at) => Err(Error::AlreadyLowered { at }),
            None => Ok(self.with_lists(
                self.lists.iter().map(|list| list.iter().flat_map(|a| a.parts()).collect()).collect(),
            )),
        }
    }

    /// The same schedule with other lists, which the caller knows to be well placed.
    pub(crate) fn with_lists(&self, lists: Vec<Vec<Action>>) -> Self {
        Schedule { placement: self.placement.clone(), lists, ..*self }
    }

    /// Position of a message in a dense table of [`Schedule::slots`] entries. A micro-batch goes through one copy of the pipeline, so
    /// the same stage of another copy has no message of it.
    pub(crate) fn slot(&self, message: Message) -> usize {
        let length = self.placement.length() as usize;
        let row = message.flow as usize * length + self.placement.within_copy(message.stage) as usize;
        row * self.microbatches as usize + message.microbatch as usize
    }

    /// Size of a table of all messages of the step: at most two per forward pass.
    pub(crate) fn slots(&self) -> usize {
        2 * self.placement.length() as usize * self.microbatches as usize
    }
}
