//! One stage per rank, backward passes whole.

use crate::{Action, Kind, Pass, Placement, Result, Schedule};

/// GPipe (arXiv 1811.06965): all forward passes, then all backward passes.
///
/// With stage costs f and b, each rank idles (p−1)(f+b) per step and keeps m activations.
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn gpipe(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardBackward, |_| microbatches)
}

/// 1F1B (PipeDream-Flush, arXiv 2006.09503; Megatron's non-interleaved schedule): rank r goes p−r−1 micro-batches ahead,
/// then alternates one forward and one backward pass.
///
/// With stage costs f and b, each rank idles (p−1)(f+b) per step like GPipe's, but keeps only min(m, p−r) activations.
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn one_f_one_b(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardBackward, |rank| (ranks - rank).min(microbatches))
}

/// Forward passes alone, for evaluation.
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn forward_only(ranks: u32, microbatches: u32) -> Result<Schedule> {
    linear(ranks, microbatches, Pass::ForwardOnly, |_| microbatches)
}

/// Forward passes alone over any placement of one pipeline. In every unit of time each rank takes the latest of its stages that
/// has something to do: over [looped](Placement::looped) stages, groups of p micro-batches, each through one stage before the
/// next.
///
/// # Errors
/// No micro-batch, or a placement of several copies.
pub fn forward_only_over(placement: &Placement, microbatches: u32) -> Result<Schedule> {
    let mut lists = vec![Vec::new(); placement.ranks() as usize];
    let mut done = vec![0; placement.stages() as usize];
    while done.last().is_some_and(|&done| done < microbatches) {
        let before = done.clone();
        let ready = |&stage: &usize| match stage.checked_sub(1) {
            Some(earlier) => before[stage] < before[earlier],
            None => before[stage] < microbatches,
        };
        for (rank, list) in (0..).zip(&mut lists) {
            let own = placement.stages_of(rank).iter().rev().map(|&stage| stage as usize);
            if let Some(stage) = own.into_iter().find(ready) {
                list.push(Action::new(stage as u32, Kind::Forward, done[stage]));
                done[stage] += 1;
            }
        }
    }
    Schedule::new(placement.clone(), microbatches, Pass::ForwardOnly, lists)
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
