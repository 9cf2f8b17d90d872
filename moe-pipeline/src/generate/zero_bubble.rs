//! Backward passes in halves: input gradients first, weight gradients where the rank would idle (arXiv 2401.10241).

use super::interleaved::Interleaved;
use super::turns::Turns;
use crate::{Action, Error, Kind, Pass, Placement, Result, Schedule};

/// ZB-H1 (arXiv 2401.10241): 1F1B in which rank r does each `W` r input gradients after its own.
///
/// With stage costs f, i and w, each rank idles (p−1)(f+i) − (min(m, p)−1)w per step if w is no longer than f and i, which is
/// (p−1)(f+i−w) from p micro-batches on, and keeps min(m, p) activations: as many as the first rank of [1F1B](super::one_f_one_b).
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn zb_h1(ranks: u32, microbatches: u32) -> Result<Schedule> {
    interleaved_zero_bubble(ranks, 1, microbatches, None)
}

/// [ZB-H1](zb_h1) over interleaved stages (torch's `ScheduleInterleavedZeroBubble`): `virtual_stages` stages per rank and
/// groups of micro-batches as in [`interleaved_1f1b`](super::interleaved_1f1b), but rank r goes only (p−r−1) + (v−1)·group
/// passes ahead.
///
/// # Errors
/// As [`interleaved_1f1b`](super::interleaved_1f1b); one virtual stage takes any number of micro-batches.
pub fn interleaved_zero_bubble(
    ranks: u32,
    virtual_stages: u32,
    microbatches: u32,
    group: Option<u32>,
) -> Result<Schedule> {
    let sizes = Interleaved::new(ranks, virtual_stages, microbatches, group)?;
    sizes.schedule(|rank| {
        let passes = sizes.passes(rank, Kind::BackwardInput);
        passes.alternate_split(sizes.ahead(rank, 1), rank as usize, weight)
    })
}

/// ZB-H2 (arXiv 2401.10241): rank r goes 2(p−r−1) + 1 micro-batches ahead and does each `W` 2r input gradients after its own.
///
/// With i no longer than f + w and at least 2p−1 micro-batches each rank idles (p−1)f in a step that all ranks begin and end
/// together; with equal f, i and w no rank idles between its first and its last action. Each rank keeps 2p−1 activations, twice as many as with [1F1B](super::one_f_one_b).
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn zb_h2(ranks: u32, microbatches: u32) -> Result<Schedule> {
    let sizes = Interleaved::new(ranks, 1, microbatches, None)?;
    sizes.schedule(|rank| {
        let passes = sizes.passes(rank, Kind::BackwardInput);
        passes.alternate_split(sizes.ahead(rank, 2), 2 * rank as usize, weight)
    })
}

fn weight(input: Action) -> Action {
    Action { kind: Kind::BackwardWeight, ..input }
}

/// ZB-V (arXiv 2401.10241, section 6; torch's `ScheduleZBVZeroBubble`): two stages per rank, placed [in a V](Placement::v_shaped),
/// so that the rank that begins a micro-batch forward also begins it backward.
///
/// With equal f, i and w and at least 2p−1 micro-batches no rank idles between its first and its last action. Each rank
/// keeps 2p activations of a stage, which is the memory of [1F1B](super::one_f_one_b)'s first rank, as a stage is half of a rank's layers.
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn zb_v(ranks: u32, microbatches: u32) -> Result<Schedule> {
    let placement = Placement::v_shaped(ranks)?;
    if microbatches == 0 {
        return Err(Error::Empty { what: "micro-batch" });
    }
    // The pattern is that of enough micro-batches to fill the pipeline; those that are not there drop out. After as many turns as
    // there are micro-batches nothing is left for another.
    let filled = microbatches.max(2 * ranks - 1);
    let turn = |times: u32| 0..times.min(microbatches);
    let list = |rank: u32| {
        let (down, up) = (rank, 2 * ranks - 1 - rank);
        let mut turns = Turns::new([down, up].map(|stage| (stage, 0..microbatches)));
        turn(2 * (ranks - rank) - 1).for_each(|_| turns.forward(down));
        for _ in turn(rank) {
            turns.forward(up);
            turns.forward(down);
        }
        for _ in turn(ranks - rank) {
            turns.forward(up);
            turns.input(up);
            turns.weight_of(up);
        }
        // As many as go forward through the upper stage from here on.
        for _ in turn(filled - ranks) {
            turns.forward(down);
            turns.input(down);
            turns.weight_of(down);
            turns.forward(up);
            turns.input(up);
            turns.weight_of(up);
        }
        for _ in turn(rank) {
            turns.input(down);
            turns.input(up);
        }
        for _ in turn(ranks - rank) {
            turns.input(down);
            turns.weight_of(down);
        }
        turns.finish_by_stage([up, down])
    };
    Schedule::new(placement, microbatches, Pass::ForwardBackward, (0..ranks).map(list).collect())
}
