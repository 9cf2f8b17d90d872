//! Two streams of micro-batches that meet: DualPipe and its V-shaped half (arXiv 2412.19437).

use super::turns::Turns;
use crate::{Action, Error, Pass, Placement, Result, Schedule};

/// DualPipe (DeepSeek-V3, arXiv 2412.19437): [two copies](Placement::bidirectional) of the pipeline run towards each other,
/// the first with the first half of the micro-batches. Forward passes of one copy [overlap](crate::Kind::Overlap) with backward
/// passes of the other.
///
/// With F&B the time of an overlap and equal f, i and w, the idlest rank idles (p/2−1)(F&B + B − 3W) per step, and each keeps p+1
/// activations. Every rank holds two stages' weights; the sums of both copies must be added before they are used.
///
/// # Errors
/// No rank, an odd number of ranks, an odd number of micro-batches or fewer than 2p, or more stages than can be numbered.
pub fn dual_pipe(ranks: u32, microbatches: u32) -> Result<Schedule> {
    let placement = Placement::bidirectional(ranks)?;
    let least = 2 * ranks;
    if !ranks.is_multiple_of(2) || !microbatches.is_multiple_of(2) || microbatches < least {
        let needs = match ranks.is_multiple_of(2) {
            true => format!("an even number of them, at least {least}"),
            false => "an even number of ranks".to_owned(),
        };
        return Err(Error::Sizes { schedule: "DualPipe", ranks, microbatches, needs });
    }
    let half = microbatches / 2;
    let list = |rank: u32| {
        let (first, second) = ((rank, 0..half), (2 * ranks - 1 - rank, half..microbatches));
        // Each half of the ranks calls that copy the near one which begins at its end.
        let (near, far) = if rank < ranks / 2 { (first, second) } else { (second, first) };
        let depth = rank.min(ranks - 1 - rank);
        meet(Turns::new([near.clone(), far.clone()]), near.0, far.0, depth, ranks / 2, half)
    };
    Schedule::new(placement, microbatches, Pass::ForwardBackward, (0..ranks).map(list).collect())
}

/// DualPipeV (a “cut in half” [DualPipe](dual_pipe); torch's `ScheduleDualPipeV`): two stages per rank, placed
/// [in a V](Placement::v_shaped). Forward passes of one stage [overlap](crate::Kind::Overlap) with backward passes of the other,
/// and there is one copy of the weights.
///
/// With F&B the time of an overlap and equal f, i and w, the idlest rank idles (p−1)(F&B + B − 3W) per step, and each keeps 2p+1
/// activations of a stage.
///
/// # Errors
/// No rank, fewer micro-batches than stages (2p), or more stages than can be numbered.
pub fn dual_pipe_v(ranks: u32, microbatches: u32) -> Result<Schedule> {
    let placement = Placement::v_shaped(ranks)?;
    let least = 2 * ranks;
    if microbatches < least {
        let needs = format!("at least {least}");
        return Err(Error::Sizes { schedule: "DualPipeV", ranks, microbatches, needs });
    }
    let list = |rank: u32| {
        let (near, far) = (rank, 2 * ranks - 1 - rank);
        meet(
            Turns::new([near, far].map(|stage| (stage, 0..microbatches))),
            near,
            far,
            rank,
            ranks,
            microbatches,
        )
    };
    Schedule::new(placement, microbatches, Pass::ForwardBackward, (0..ranks).map(list).collect())
}

/// The list of a rank at `depth` from the end at which its near stage begins, in a stretch of `length` ranks, at whose other
/// end the two streams meet. Both stages take `microbatches`. The eight steps are those of DeepSeek's description.
fn meet(mut turns: Turns, near: u32, far: u32, depth: u32, length: u32, microbatches: u32) -> Vec<Action> {
    let (before, after) = (length - 1 - depth, depth + 1);
    (0..2 * before).for_each(|_| turns.forward(near));
    for _ in 0..after {
        turns.forward(near);
        turns.forward(far);
    }
    for _ in 0..before {
        turns.input(far);
        turns.weight();
        turns.forward(far);
    }
    for turn in 0..microbatches - 2 * length + after {
        // Where the streams meet, what the first overlap would wait for comes from its own far stage: apart, they wait less.
        if turn == 0 && before == 0 {
            turns.forward(near);
            turns.backward(far);
        } else {
            turns.overlap(near, far);
        }
        turns.overlap(far, near);
    }
    for _ in 0..before {
        turns.backward(far);
        turns.overlap(far, near);
    }
    // The first half of these whole, the second half with the weight gradients left for the end.
    for turn in 0..2 * after {
        let stage = if turn % 2 == 0 { far } else { near };
        if turn < after { turns.backward(stage) } else { turns.input(stage) }
    }
    for _ in 0..before {
        turns.weight();
        turns.input(near);
    }
    turns.finish()
}
