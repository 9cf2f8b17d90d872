//! Several stages per rank, in rounds.

use super::alternate::Passes;
use super::linear::one_f_one_b;
use crate::{Action, Error, Kind, Pass, Placement, Result, Schedule};

/// Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): each rank has `virtual_stages` stages, [looped](Placement::looped),
/// and takes micro-batches through them in groups of `group`, all of a group through one stage before the next. Rank r
/// goes 2(p−r−1) + (v−1)·group passes ahead, then alternates one forward and one backward pass.
///
/// With stage costs f and b, groups of p and m a multiple of p, each rank idles (p−1)(f+b) per step, which is 1/v of
/// 1F1B's, as a stage is 1/v of a rank's layers; it keeps min(m·v, 2(p−r−1) + (v−1)·group + 1) activations of a stage.
/// Larger groups keep more and give each message more time.
///
/// `group` is Megatron's `microbatch_group_size_per_vp_stage`, and p unless given, as there. ([`Sizes`](super::Sizes) without a
/// group take torch's, which is larger where p does not divide m.) One virtual stage is [1F1B](one_f_one_b), whatever the group.
///
/// # Errors
/// No rank, virtual stage or micro-batch, or more stages than can be numbered. With several virtual stages, a group larger than m; or
/// a group, or a rest of m in the last one, smaller than p, in which a micro-batch would not be back at the first rank when its turn
/// comes. (A group of all m is legal however few they are: ranks then wait for it.)
pub fn interleaved_1f1b(
    ranks: u32,
    virtual_stages: u32,
    microbatches: u32,
    group: Option<u32>,
) -> Result<Schedule> {
    if virtual_stages == 1 {
        return one_f_one_b(ranks, microbatches);
    }
    let sizes = Interleaved::new(ranks, virtual_stages, microbatches, group)?;
    sizes.schedule(|rank| sizes.passes(rank, Kind::Backward).alternate(sizes.ahead(rank, 2)))
}

/// Interleaved 1F1B whose forward and backward passes run in pairs (Megatron-LM's `overlap_moe_expert_parallel_comm`): each
/// turn of one forward and one backward pass is an [overlap](Kind::Overlap), in which the all-to-alls of one pass hide behind
/// the other's compute. For that the two must not need each other, so ranks go one pass further ahead than in
/// [`interleaved_1f1b`]: 2(p−r−1) + (v−1)·group + 1.
///
/// With groups of p and m a multiple of p, rank r keeps min(m·v, p·v + p − 2r) activations of a stage, those of both passes of
/// a pair among them. With one virtual stage the rule is the same, so that ranks go twice as far ahead as in [1F1B](one_f_one_b).
///
/// # Errors
/// As [`interleaved_1f1b`]; one virtual stage takes any number of micro-batches.
pub fn overlapped_1f1b(
    ranks: u32,
    virtual_stages: u32,
    microbatches: u32,
    group: Option<u32>,
) -> Result<Schedule> {
    let sizes = Interleaved::new(ranks, virtual_stages, microbatches, group)?;
    sizes.schedule(|rank| sizes.passes(rank, Kind::Backward).overlap(sizes.ahead(rank, 2) + 1))
}

/// Breadth-first (arXiv 2211.05953): each rank has `virtual_stages` stages, [looped](Placement::looped), and takes all
/// micro-batches through one of them before the next, forward through all stages, then backward. One virtual stage is
/// [GPipe](super::gpipe).
///
/// Any number of micro-batches is legal, as against [`interleaved_1f1b`], and all activations are kept. With stage costs f and b each
/// rank idles (p−1 + (v−1)·max(p−m, 0))(f+b) per step: where ranks have fewer micro-batches than they are, they wait in each round.
/// Micro-batches go backward in ascending order, where torch's `ScheduleLoopedBFS` takes the last one first.
///
/// # Errors
/// No rank, virtual stage or micro-batch, or more stages than can be numbered.
pub fn breadth_first(ranks: u32, virtual_stages: u32, microbatches: u32) -> Result<Schedule> {
    let placement = Placement::looped(ranks, virtual_stages)?;
    let list = |rank: u32| {
        let through = move |stage: u32, kind| {
            (0..microbatches).map(move |m| Action::new(stage * ranks + rank, kind, m))
        };
        let forward = (0..virtual_stages).flat_map(|v| through(v, Kind::Forward));
        let backward = (0..virtual_stages).rev().flat_map(|v| through(v, Kind::Backward));
        forward.chain(backward).collect()
    };
    Schedule::new(placement, microbatches, Pass::ForwardBackward, (0..ranks).map(list).collect())
}

/// Sizes of an interleaved schedule.
pub(super) struct Interleaved {
    placement: Placement,
    ranks: u32,
    virtual_stages: u32,
    microbatches: u32,
    group: u32,
}

impl Interleaved {
    /// Megatron's rule of groups; one virtual stage knows none.
    pub(super) fn new(
        ranks: u32,
        virtual_stages: u32,
        microbatches: u32,
        group: Option<u32>,
    ) -> Result<Self> {
        let placement = Placement::looped(ranks, virtual_stages)?;
        if microbatches == 0 {
            return Err(Error::Empty { what: "micro-batch" });
        }
        let group = match virtual_stages {
            1 => microbatches,
            _ => group.unwrap_or(ranks),
        };
        let rest = microbatches.checked_rem(group).unwrap_or(0);
        let full = group >= ranks && group <= microbatches && (rest == 0 || rest >= ranks);
        if !full && group != microbatches {
            return Err(Error::Group { ranks, virtual_stages, microbatches, group });
        }
        Ok(Interleaved { placement, ranks, virtual_stages, microbatches, group })
    }

    /// The passes of `rank`, backward ones of the kind `backward`.
    pub(super) fn passes(&self, rank: u32, backward: Kind) -> Passes {
        let &Interleaved { ranks, virtual_stages, microbatches, group, .. } = self;
        let grouped = || grouped(virtual_stages, microbatches, group);
        let stage = |v: u32| v * ranks + rank;
        Passes {
            forward: grouped().map(|(v, m)| Action::new(stage(v), Kind::Forward, m)).collect(),
            backward: grouped()
                .map(|(v, m)| Action::new(stage(virtual_stages - 1 - v), backward, m))
                .collect(),
        }
    }

    /// Forward passes that `rank` goes ahead: what the last rank needs to begin, and `per_rank` more for each rank before it.
    pub(super) fn ahead(&self, rank: u32, per_rank: u32) -> u64 {
        u64::from(per_rank) * u64::from(self.ranks - rank - 1)
            + u64::from(self.virtual_stages - 1) * u64::from(self.group)
    }

    pub(super) fn schedule(&self, list: impl Fn(u32) -> Vec<Action>) -> Result<Schedule> {
        let lists = (0..self.ranks).map(list).collect();
        Schedule::new(self.placement.clone(), self.microbatches, Pass::ForwardBackward, lists)
    }
}

/// The passes of a rank as (which of its stages, micro-batch): groups of micro-batches, each through all stages.
fn grouped(virtual_stages: u32, microbatches: u32, group: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..microbatches).step_by(group as usize).flat_map(move |first| {
        let end = first.saturating_add(group).min(microbatches);
        (0..virtual_stages).flat_map(move |v| (first..end).map(move |m| (v, m)))
    })
}
