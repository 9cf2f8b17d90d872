//! V-shaped schedules that keep half or a third of the activations (arXiv 2405.15362).
//!
//! A *building block* says in which slot each rank does each pass of the first micro-batch; later ones do the same, 6 slots
//! (a pass each of `F`, `I` and `W` of two stages) later each. How many slots lie between a forward pass and its `W` is how many
//! activations are kept. A repeated block begins and ends slowly, so passes of the beginning and the end are then moved to
//! earlier slots, where no more is kept for it; and `W` goes wherever a rank would idle.

use std::collections::VecDeque;

use crate::{Action, Error, Kind, Pass, Placement, Result, Schedule};

/// Slots from one micro-batch to the next.
const PERIOD: usize = 6;

/// V-Half (arXiv 2405.15362): two stages per rank, placed [in a V](Placement::v_shaped), with about half of the activations of
/// [ZB-V](super::zb_v).
///
/// With equal f, i and w and at least 2p micro-batches each rank idles (3p−7)f for an even p from 4 on, (3p−4)f for an odd one from
/// 3 on, however many micro-batches there are; it keeps at most p+2 activations of a stage, p+1 for an odd p. With other costs it
/// may idle more. To make it takes a time that is linear in m, and for its beginning and end one that grows with p³.
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn v_half(ranks: u32, microbatches: u32) -> Result<Schedule> {
    from_block(ranks, microbatches, |p, r| {
        let gap = if p.is_multiple_of(2) { 3 } else { 0 };
        [2 * r, 3 * p - r - 2, 3 * p + gap + 2 * r - 1, 6 * p + gap - r - 2]
    })
}

/// V-Min (arXiv 2405.15362): two stages per rank, placed [in a V](Placement::v_shaped), with about a third of the activations of
/// [ZB-V](super::zb_v).
///
/// With equal f, i and w, p ≥ 2 and at least 2p micro-batches each rank idles (4p−7)f if 3 divides p and (4p−5)f otherwise; it keeps
/// at most 2⌊(p+1)/3⌋ + 2 activations of a stage. With other costs the idle time grows with the number of micro-batches: ask the
/// simulator. It takes as long to make as [V-Half](v_half).
///
/// # Errors
/// No rank or no micro-batch, or more stages than can be numbered.
pub fn v_min(ranks: u32, microbatches: u32) -> Result<Schedule> {
    from_block(ranks, microbatches, |p, r| {
        let gap = if p.is_multiple_of(3) { 2 } else { 0 };
        [r, 2 * p - r - 1, 2 * p + gap + r, 4 * p + gap - r - 1]
    })
}

/// The passes of a micro-batch on a rank, in the order of its way: down the ranks and up forward, down and up backward.
const FORWARD_DOWN: usize = 0;
const FORWARD_UP: usize = 1;
const BACKWARD_DOWN: usize = 2;
const BACKWARD_UP: usize = 3;
/// In slots, a weight gradient of either stage.
const WEIGHT: usize = 4;

/// Which pass, of which micro-batch; of [`WEIGHT`], of which of the rank's input gradients in order.
type Step = (usize, usize);

fn from_block(ranks: u32, microbatches: u32, block: impl Fn(usize, usize) -> [usize; 4]) -> Result<Schedule> {
    let placement = Placement::v_shaped(ranks)?;
    if microbatches == 0 {
        return Err(Error::Empty { what: "micro-batch" });
    }
    let (p, m) = (ranks as usize, microbatches as usize);
    let blocks: Vec<[usize; 4]> = (0..p).map(|rank| block(p, rank)).collect();
    let plans: Vec<Plan> = blocks.iter().map(|block| Plan::repeat(block, m)).collect();
    let most = plans.iter().flat_map(|plan| &plan.kept).copied().max().unwrap_or(0);
    let end_of_start = blocks[0][BACKWARD_UP];
    let start_of_end = blocks[0][FORWARD_DOWN] + PERIOD * (m - 1);
    let orders = squeeze(plans, m, most, end_of_start, start_of_end);
    // Whether it helps that the last passes overtake each other depends on p.
    let strict = fill(&orders, m, most, 1);
    let loose = fill(&orders, m, most, 2);
    let lists = if loose.slots < strict.slots { loose.lists } else { strict.lists };
    let action = |rank: u32, (pass, m): Step, kind| {
        let up = matches!(pass, FORWARD_UP | BACKWARD_DOWN);
        Action::new(if up { 2 * ranks - 1 - rank } else { rank }, kind, m as u32)
    };
    let to_actions = |(rank, list): (u32, Vec<(Step, Kind)>)| {
        list.into_iter().map(|(step, kind)| action(rank, step, kind)).collect()
    };
    let lists = (0..ranks).zip(lists).map(to_actions).collect();
    Schedule::new(placement, microbatches, Pass::ForwardBackward, lists)
}

/// When each pass is done: `at[rank][pass][micro-batch]`.
struct Done {
    at: Vec<[Vec<Option<usize>>; 4]>,
}

impl Done {
    fn new(ranks: usize, microbatches: usize) -> Self {
        Done { at: vec![std::array::from_fn(|_| vec![None; microbatches]); ranks] }
    }

    /// The first slot in which a pass can be done, by the one before it on the micro-batch's way; none if that is not done.
    fn ready(&self, rank: usize, (pass, m): Step) -> Option<usize> {
        let last = self.at.len() - 1;
        let before = match pass {
            FORWARD_DOWN if rank == 0 => return Some(0),
            FORWARD_DOWN | BACKWARD_DOWN if rank > 0 => (rank - 1, pass),
            FORWARD_UP | BACKWARD_UP if rank < last => (rank + 1, pass),
            _ => (rank, pass - 1),
        };
        self.at[before.0][before.1][m].map(|slot| slot + 1)
    }
}

/// A rank's slots.
struct Plan {
    slots: Vec<Option<Step>>,
    /// Activations kept after each slot.
    kept: Vec<usize>,
}

impl Plan {
    /// The block for all micro-batches, weight gradients in the first slots that are free.
    fn repeat(block: &[usize; 4], microbatches: usize) -> Self {
        let last = block[BACKWARD_UP] + PERIOD * (microbatches - 1);
        let mut slots = vec![None; last + 1];
        for (pass, first) in block.iter().enumerate() {
            for m in 0..microbatches {
                slots[first + PERIOD * m] = Some((pass, m));
            }
        }
        let (mut waiting, mut weights, mut now) = (0, 0, 0);
        let mut kept = Vec::with_capacity(slots.len());
        for slot in &mut slots {
            match slot {
                Some((FORWARD_DOWN | FORWARD_UP, _)) => now += 1,
                Some(_) => waiting += 1,
                None if waiting > 0 => {
                    *slot = Some((WEIGHT, weights));
                    (waiting, weights, now) = (waiting - 1, weights + 1, now - 1);
                }
                None => {}
            }
            kept.push(now);
        }
        Plan { slots, kept }
    }
}

/// Moves the passes before slot `end_of_start` and after `start_of_end`, each rank's in order, to the first free slot in which
/// they can be done without any rank keeping more than `most`. The order of passes, without weight gradients, that results.
fn squeeze(
    mut plans: Vec<Plan>,
    microbatches: usize,
    most: usize,
    end_of_start: usize,
    start_of_end: usize,
) -> Vec<Vec<Step>> {
    let slots = plans.iter().map(|plan| plan.slots.len()).max().unwrap_or(0);
    let mut done = Done::new(plans.len(), microbatches);
    let mut placed: Vec<Vec<Option<Step>>> = plans.iter().map(|plan| vec![None; plan.slots.len()]).collect();
    // Per rank, the slots of its input gradients in order, and of the last of each kind of pass.
    let mut inputs: Vec<Vec<usize>> = vec![Vec::new(); plans.len()];
    let mut previous: Vec<[Option<usize>; 5]> = vec![[None; 5]; plans.len()];
    for planned in 0..slots {
        for (rank, plan) in plans.iter_mut().enumerate() {
            let Some(&Some(step)) = plan.slots.get(planned) else { continue };
            let (pass, m) = step;
            let mut slot = planned;
            if planned < end_of_start || planned > start_of_end {
                let after = previous[rank][pass].map_or(0, |slot| slot + 1);
                let ready = match pass {
                    WEIGHT => inputs[rank].get(m).map(|slot| slot + 1),
                    _ => done.ready(rank, step),
                };
                let first = ready.unwrap_or(planned).max(after);
                for earlier in (first..planned).rev() {
                    if matches!(pass, FORWARD_DOWN | FORWARD_UP) && plan.kept[earlier] >= most {
                        break;
                    }
                    if placed[rank][earlier].is_none() {
                        slot = earlier;
                    }
                }
                for kept in &mut plan.kept[slot..planned] {
                    match pass {
                        FORWARD_DOWN | FORWARD_UP => *kept += 1,
                        WEIGHT => *kept -= 1,
                        _ => {}
                    }
                }
            }
            placed[rank][slot] = Some(step);
            previous[rank][pass] = Some(slot);
            if pass != WEIGHT {
                done.at[rank][pass][m] = Some(slot);
            }
            if matches!(pass, BACKWARD_DOWN | BACKWARD_UP) {
                let later = inputs[rank].iter().rev().take_while(|&&input| input > slot).count();
                let at = inputs[rank].len() - later;
                inputs[rank].insert(at, slot);
            }
        }
    }
    let order =
        |slots: Vec<Option<Step>>| slots.into_iter().flatten().filter(|(pass, _)| *pass != WEIGHT).collect();
    placed.into_iter().map(order).collect()
}

/// Lists with weight gradients, and how many slots they take.
struct Filled {
    slots: usize,
    lists: Vec<Vec<(Step, Kind)>>,
}

/// Runs the orders, a pass of each rank per slot. A rank whose next pass cannot be done yet, or would make it keep more than
/// `most`, does the weight gradient that has waited longest. Once its last forward pass down is done, it looks for a pass among the
/// next `window`.
fn fill(orders: &[Vec<Step>], microbatches: usize, most: usize, window: usize) -> Filled {
    struct Rank {
        next: usize,
        /// Passes after the next one that are done already.
        overtook: VecDeque<usize>,
        waiting: VecDeque<Step>,
        kept: usize,
        window: usize,
    }
    let start = |_| Rank { next: 0, overtook: VecDeque::new(), waiting: VecDeque::new(), kept: 0, window: 1 };
    let mut ranks: Vec<Rank> = orders.iter().map(start).collect();
    let mut done = Done::new(orders.len(), microbatches);
    let mut lists: Vec<Vec<(Step, Kind)>> =
        orders.iter().map(|o| Vec::with_capacity(o.len() * 3 / 2)).collect();
    let mut left: usize = orders.iter().map(|order| order.len() * 3 / 2).sum();
    let mut slot = 0;
    while left > 0 {
        for (r, rank) in ranks.iter_mut().enumerate() {
            let order = &orders[r];
            let mut would_keep = rank.kept;
            let mut choice = None;
            let not_done = (rank.next..order.len()).filter(|at| !rank.overtook.contains(at));
            for at in not_done.take(rank.window) {
                let (pass, _) = order[at];
                let forward = matches!(pass, FORWARD_DOWN | FORWARD_UP);
                would_keep += usize::from(forward);
                let in_order = at == rank.next || pass != order[rank.next].0;
                let ready = done.ready(r, order[at]).is_some_and(|ready| ready <= slot);
                if in_order && ready && !(forward && would_keep > most) {
                    choice = Some(at);
                    break;
                }
            }
            let Some(at) = choice else {
                if let Some(step) = rank.waiting.pop_front() {
                    lists[r].push((step, Kind::BackwardWeight));
                    (rank.kept, left) = (rank.kept - 1, left - 1);
                }
                continue;
            };
            let step @ (pass, m) = order[at];
            done.at[r][pass][m] = Some(slot);
            left -= 1;
            if matches!(pass, FORWARD_DOWN | FORWARD_UP) {
                rank.kept += 1;
                lists[r].push((step, Kind::Forward));
            } else {
                rank.waiting.push_back(step);
                lists[r].push((step, Kind::BackwardInput));
            }
            if pass == FORWARD_DOWN && m + 1 == microbatches {
                rank.window = window;
            }
            rank.overtook.push_back(at);
            while let Some(at) = rank.overtook.iter().position(|&at| at == rank.next) {
                rank.overtook.remove(at);
                rank.next += 1;
            }
        }
        slot += 1;
    }
    Filled { slots: slot, lists }
}
