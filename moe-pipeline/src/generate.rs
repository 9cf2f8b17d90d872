//! Published schedules, as pure functions of their sizes, of compute actions only.

use crate::{Action, Error, Kind, Pass, Placement, Result, Schedule};

/// GPipe (arXiv 1811.06965): all forward passes, then all backward passes.
///
/// With stage costs f and b, each rank idles (p−1)(f+b) per step and keeps m activations.
///
/// # Errors
/// No rank or no micro-batch.
pub fn gpipe(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardBackward, |_| microbatches)
}

/// 1F1B (PipeDream-Flush, arXiv 2006.09503; Megatron's non-interleaved schedule): rank r goes p−r−1 micro-batches ahead,
/// then alternates one forward and one backward pass.
///
/// With stage costs f and b, each rank idles (p−1)(f+b) per step like GPipe's, but keeps only min(m, p−r) activations.
///
/// # Errors
/// No rank or no micro-batch.
pub fn one_f_one_b(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardBackward, |rank| (ranks - rank).min(microbatches))
}

/// Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): each rank has `virtual_stages` stages, [looped](Placement::looped),
/// and takes micro-batches through them in groups of `group`, all of a group through one stage before the next. Rank r
/// goes 2(p−r−1) + (v−1)·group passes ahead, then alternates one forward and one backward pass.
///
/// With stage costs f and b, groups of p and m a multiple of p, each rank idles (p−1)(f+b) per step, which is 1/v of
/// 1F1B's, as a stage is 1/v of a rank's layers; it keeps min(m·v, 2(p−r−1) + (v−1)·group + 1) activations of a stage.
/// Larger groups keep more and give each message more time.
///
/// `group` is p unless given, and Megatron's `microbatch_group_size_per_vp_stage`. One virtual stage is [1F1B](one_f_one_b),
/// whatever the group.
///
/// # Errors
/// No rank, virtual stage or micro-batch. With several virtual stages, a group larger than m; or a group, or a rest of m in
/// the last one, smaller than p, in which a micro-batch would not be back at the first rank when its turn comes.
pub fn interleaved_1f1b(
    ranks: u32,
    virtual_stages: u32,
    microbatches: u32,
    group: Option<u32>,
) -> Result<Schedule> {
    if virtual_stages == 1 {
        return one_f_one_b(ranks, microbatches);
    }
    let placement = Placement::looped(ranks, virtual_stages)?;
    if microbatches == 0 {
        return Err(Error::Empty { what: "micro-batch" });
    }
    let group = group.unwrap_or(ranks);
    let rest = microbatches.checked_rem(group).unwrap_or(0);
    if group < ranks || group > microbatches || (rest > 0 && rest < ranks) {
        return Err(Error::Group { ranks, virtual_stages, microbatches, group });
    }
    let list = |rank: u32| {
        let forward: Vec<Action> = grouped(virtual_stages, microbatches, group)
            .map(|(v, m)| Action::new(v * ranks + rank, Kind::Forward, m))
            .collect();
        let backward: Vec<Action> = grouped(virtual_stages, microbatches, group)
            .map(|(v, m)| Action::new((virtual_stages - 1 - v) * ranks + rank, Kind::Backward, m))
            .collect();
        let ahead = 2 * u64::from(ranks - rank - 1) + u64::from(virtual_stages - 1) * u64::from(group);
        let ahead = forward.len().min(usize::try_from(ahead).unwrap_or(usize::MAX));
        let mut list = forward[..ahead].to_vec();
        for (at, &backward) in backward.iter().enumerate() {
            list.extend(forward.get(ahead + at));
            list.push(backward);
        }
        list
    };
    Schedule::new(placement, microbatches, Pass::ForwardBackward, (0..ranks).map(list).collect())
}

/// Breadth-first (arXiv 2211.05953): each rank has `virtual_stages` stages, [looped](Placement::looped), and takes all
/// micro-batches through one of them before the next, forward through all stages, then backward. One virtual stage is
/// [GPipe](gpipe).
///
/// Any number of micro-batches is legal, as against [`interleaved_1f1b`], and all activations are kept. Micro-batches go
/// backward in ascending order, where torch's `ScheduleLoopedBFS` takes the last one first.
///
/// # Errors
/// No rank, virtual stage or micro-batch.
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

/// Forward passes alone over [looped](Placement::looped) stages, for evaluation: any number of micro-batches, in groups of
/// p. One virtual stage is [`forward_only`].
///
/// # Errors
/// No rank, virtual stage or micro-batch.
pub fn interleaved_forward_only(ranks: u32, virtual_stages: u32, microbatches: u32) -> Result<Schedule> {
    let placement = Placement::looped(ranks, virtual_stages)?;
    let list = |rank: u32| {
        grouped(virtual_stages, microbatches, ranks)
            .map(|(v, m)| Action::new(v * ranks + rank, Kind::Forward, m))
            .collect()
    };
    Schedule::new(placement, microbatches, Pass::ForwardOnly, (0..ranks).map(list).collect())
}

/// The passes of a rank as (which of its stages, micro-batch): groups of micro-batches, each through all stages.
fn grouped(virtual_stages: u32, microbatches: u32, group: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..microbatches).step_by(group as usize).flat_map(move |first| {
        let end = first.saturating_add(group).min(microbatches);
        (0..virtual_stages).flat_map(move |v| (first..end).map(move |m| (v, m)))
    })
}

/// Forward passes alone, for evaluation.
///
/// # Errors
/// No rank or no micro-batch.
pub fn forward_only(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardOnly, |_| microbatches)
}

/// One stage per rank; `ahead(rank)` forward passes come before the rank's first backward pass, then they alternate.
fn linear(ranks: u32, microbatches: u32, pass: Pass, ahead: impl Fn(u32) -> u32) -> Result<Schedule> {
    let list = |rank| {
        let forward = |m| Action::new(rank, Kind::Forward, m);
        let backward = |m| Action::new(rank, Kind::Backward, m);
        let ahead = ahead(rank);
        let mut list: Vec<Action> = (0..ahead).map(forward).collect();
        if pass == Pass::ForwardBackward {
            for m in 0..microbatches {
                list.push(backward(m));
                list.extend((ahead + m < microbatches).then(|| forward(ahead + m)));
            }
        }
        list
    };
    Schedule::new(Placement::linear(ranks)?, microbatches, pass, (0..ranks).map(list).collect())
}
