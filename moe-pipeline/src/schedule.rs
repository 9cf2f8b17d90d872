//! Who owns which stage, and what each rank does in which order.

use crate::{Action, At, Error, Flow, Kind, Message, Result};

/// Which rank owns which stage. One rank may own several (virtual stages), in any pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Placement {
    rank_of: Vec<u32>,
    local: Vec<u32>,
    stages_of: Vec<Vec<u32>>,
}

impl Placement {
    /// Stage `s` on rank `rank_of[s]`.
    ///
    /// # Errors
    /// No stage, or a rank below the highest that owns none.
    pub fn new(rank_of: Vec<u32>) -> Result<Self> {
        let highest = *rank_of.iter().max().ok_or(Error::Empty { what: "stage" })?;
        if rank_of.len() >= 1 << 31 {
            return Err(Error::TooManyStages { stages: rank_of.len() });
        }
        let ranks = highest.saturating_add(1);
        if highest as usize >= rank_of.len() {
            let rank = (0..ranks).find(|r| !rank_of.contains(r)).unwrap_or(highest);
            return Err(Error::RankWithoutStage { rank, ranks });
        }
        let mut stages_of = vec![Vec::new(); ranks as usize];
        let mut local = Vec::with_capacity(rank_of.len());
        for (stage, &rank) in (0..).zip(&rank_of) {
            let owned = &mut stages_of[rank as usize];
            local.push(owned.len() as u32);
            owned.push(stage);
        }
        match (0..).zip(&stages_of).find(|(_, owned)| owned.is_empty()) {
            Some((rank, _)) => Err(Error::RankWithoutStage { rank, ranks }),
            None => Ok(Placement { rank_of, local, stages_of }),
        }
    }

    /// One stage per rank, in rank order.
    ///
    /// # Errors
    /// No rank.
    pub fn linear(ranks: u32) -> Result<Self> {
        Self::new((0..ranks).collect())
    }

    /// `virtual_stages` stages per rank, in rounds: stage `s` on rank `s mod ranks`.
    ///
    /// # Errors
    /// No rank or no virtual stage, or more stages than can be numbered.
    pub fn looped(ranks: u32, virtual_stages: u32) -> Result<Self> {
        match ranks.checked_mul(virtual_stages) {
            Some(stages) if stages < 1 << 31 => Self::new((0..stages).map(|s| s % ranks).collect()),
            _ => Err(Error::TooManyStages { stages: ranks as usize * virtual_stages as usize }),
        }
    }

    /// Pipeline ranks.
    pub fn ranks(&self) -> u32 {
        self.stages_of.len() as u32
    }

    /// Stages of the pipeline.
    pub fn stages(&self) -> u32 {
        self.rank_of.len() as u32
    }

    /// The rank that owns `stage`; none beyond the last stage.
    pub fn rank_of(&self, stage: u32) -> Option<u32> {
        self.rank_of.get(stage as usize).copied()
    }

    /// The stages of `rank`, ascending; empty beyond the last rank.
    pub fn stages_of(&self, rank: u32) -> &[u32] {
        self.stages_of.get(rank as usize).map_or(&[], Vec::as_slice)
    }

    /// Position of a stage among those of its rank.
    pub(crate) fn local(&self, stage: u32) -> usize {
        self.local[stage as usize] as usize
    }

    /// The owner of a stage that is known to exist.
    pub(crate) fn owner(&self, stage: u32) -> u32 {
        self.rank_of[stage as usize]
    }

    /// The ranks that send and receive a message that is known to exist.
    pub(crate) fn ends(&self, message: Message) -> (u32, u32) {
        let (low, high) = (self.owner(message.boundary()), self.owner(message.boundary() + 1));
        match message.flow {
            Flow::Forward => (low, high),
            Flow::Backward => (high, low),
        }
    }
}

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
        if (actions as u64) < u64::from(stages) * u64::from(microbatches) {
            return Err(Error::TooFewActions { actions, stages, microbatches });
        }
        let schedule = Schedule { placement, microbatches, pass, lists };
        schedule.actions().try_for_each(|at| schedule.check(at))?;
        Ok(schedule)
    }

    fn check(&self, at: At) -> Result<()> {
        let stages = self.placement.stages();
        let action = at.action;
        let owner = self.placement.rank_of(action.stage).ok_or(Error::UnknownStage { at, stages })?;
        if owner != at.rank {
            return Err(Error::WrongRank { at, owner });
        }
        if action.microbatch >= self.microbatches {
            return Err(Error::UnknownMicrobatch { at, microbatches: self.microbatches });
        }
        let backward = match action.kind {
            Kind::Forward => false,
            Kind::BackwardInput | Kind::BackwardWeight | Kind::Backward => true,
            Kind::Send(flow) | Kind::Recv(flow) | Kind::WaitSend(flow) | Kind::WaitRecv(flow) => {
                let message = action.message(stages).ok_or(Error::NoBoundary { at })?;
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

    /// The same schedule with other lists, which the caller knows to be well placed.
    pub(crate) fn with_lists(&self, lists: Vec<Vec<Action>>) -> Self {
        Schedule { placement: self.placement.clone(), lists, ..*self }
    }

    /// Position of a message in a dense table of [`Schedule::slots`] entries.
    pub(crate) fn slot(&self, message: Message) -> usize {
        let row = message.flow as usize * self.placement.rank_of.len() + message.stage as usize;
        row * self.microbatches as usize + message.microbatch as usize
    }

    /// Size of a table of all messages of the step.
    pub(crate) fn slots(&self) -> usize {
        2 * self.placement.rank_of.len() * self.microbatches as usize
    }
}
