//! Who owns which stage.

use std::ops::Range;

use crate::{Error, Flow, Message, Result};

/// Which rank owns which stage. One rank may own several (virtual stages), in any pattern.
///
/// A placement may hold several *copies* of the pipeline, as [DualPipe](crate::generate::dual_pipe) does: stages
/// `0..stages/copies` are the first, the next as many the second, and so on. No message goes from one copy to another, and
/// each takes its share of the micro-batches.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Placement {
    rank_of: Vec<u32>,
    local: Vec<u32>,
    stages_of: Vec<Vec<u32>>,
    copies: u32,
    /// Stages of a copy.
    length: u32,
}

impl Placement {
    /// Stage `s` on rank `rank_of[s]`.
    ///
    /// # Errors
    /// No stage, more than can be numbered, or a rank below the highest that owns none.
    pub fn new(rank_of: Vec<u32>) -> Result<Self> {
        let highest = *rank_of.iter().max().ok_or(Error::Empty { what: "stage" })?;
        if rank_of.len() >= 1 << 31 {
            return Err(Error::TooManyStages { stages: rank_of.len() });
        }
        let ranks = highest.saturating_add(1);
        // Of more ranks than stages, one of the first as many owns none: what one number says makes nobody allocate.
        let mut owns = vec![false; rank_of.len().min(ranks as usize)];
        for &rank in &rank_of {
            if let Some(owns) = owns.get_mut(rank as usize) {
                *owns = true;
            }
        }
        if let Some(rank) = (0..).zip(owns).find_map(|(rank, owns)| (!owns).then_some(rank)) {
            return Err(Error::RankWithoutStage { rank, ranks });
        }
        let mut stages_of = vec![Vec::new(); ranks as usize];
        let mut local = Vec::with_capacity(rank_of.len());
        for (stage, &rank) in (0..).zip(&rank_of) {
            let owned = &mut stages_of[rank as usize];
            local.push(owned.len() as u32);
            owned.push(stage);
        }
        let length = rank_of.len() as u32;
        Ok(Placement { rank_of, local, stages_of, copies: 1, length })
    }

    /// `copies` pipelines of as many stages each: the first `rank_of.len() / copies` entries are the first one's.
    ///
    /// # Errors
    /// As [`new`](Placement::new), or stages that are no multiple of the copies.
    pub fn with_copies(rank_of: Vec<u32>, copies: u32) -> Result<Self> {
        let placement = Self::new(rank_of)?;
        let stages = placement.stages();
        match stages.checked_rem(copies) {
            Some(0) => Ok(Placement { copies, length: stages / copies, ..placement }),
            _ => Err(Error::Copies { stages, copies }),
        }
    }

    /// One stage per rank, in rank order.
    ///
    /// # Errors
    /// No rank, or more than can be numbered.
    pub fn linear(ranks: u32) -> Result<Self> {
        Self::looped(ranks, 1)
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

    /// Two stages per rank, down the ranks and back up: rank `r` owns `r` and `2·ranks − 1 − r`, so that the first and the
    /// last stage share rank 0.
    ///
    /// # Errors
    /// No rank, or more stages than can be numbered.
    pub fn v_shaped(ranks: u32) -> Result<Self> {
        Self::there_and_back(ranks, 1)
    }

    /// Two copies of a pipeline of one stage per rank, running towards each other: rank `r` owns stage `r` of the first copy
    /// and stage `ranks − 1 − r` of the second, which is numbered `2·ranks − 1 − r`.
    ///
    /// # Errors
    /// No rank, or more stages than can be numbered.
    pub fn bidirectional(ranks: u32) -> Result<Self> {
        Self::there_and_back(ranks, 2)
    }

    fn there_and_back(ranks: u32, copies: u32) -> Result<Self> {
        match ranks.checked_mul(2) {
            Some(stages) if stages < 1 << 31 => {
                Self::with_copies((0..ranks).chain((0..ranks).rev()).collect(), copies)
            }
            _ => Err(Error::TooManyStages { stages: 2 * ranks as usize }),
        }
    }

    /// Pipeline ranks.
    pub fn ranks(&self) -> u32 {
        self.stages_of.len() as u32
    }

    /// Stages of the pipeline, those of all copies.
    pub fn stages(&self) -> u32 {
        self.rank_of.len() as u32
    }

    /// Copies of the pipeline.
    pub fn copies(&self) -> u32 {
        self.copies
    }

    /// The rank that owns `stage`; none beyond the last stage.
    pub fn rank_of(&self, stage: u32) -> Option<u32> {
        self.rank_of.get(stage as usize).copied()
    }

    /// The stages of `rank`, ascending; empty beyond the last rank.
    pub fn stages_of(&self, rank: u32) -> &[u32] {
        self.stages_of.get(rank as usize).map_or(&[], Vec::as_slice)
    }

    /// The share of `microbatches` that goes through a stage that is known to exist.
    pub(crate) fn microbatches_of(&self, stage: u32, microbatches: u32) -> Range<u32> {
        let copy = stage / self.length;
        let share = |copy: u32| (u64::from(copy) * u64::from(microbatches) / u64::from(self.copies)) as u32;
        share(copy)..share(copy + 1)
    }

    /// Whether a message crosses a boundary between two stages of one copy.
    pub(crate) fn crosses(&self, message: Message) -> bool {
        let upper = match message.flow {
            Flow::Forward => message.stage,
            Flow::Backward => message.stage.saturating_add(1),
        };
        upper < self.stages() && self.within_copy(upper) > 0
    }

    /// Stages of a copy.
    pub(crate) fn length(&self) -> u32 {
        self.length
    }

    /// Position of a stage in its copy. (Every message asks, and a division takes long.)
    pub(crate) fn within_copy(&self, stage: u32) -> u32 {
        if self.copies == 1 { stage } else { stage % self.length }
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
