//! From compute actions to a program with messages.
//!
//! Sends and receives are drawn from **one global order**: the compute actions of all ranks are walked in an order in
//! which they could run, and whenever one makes something for another rank, its send and the matching receive are
//! appended to the two ranks' lists at the same moment. Every list is then a projection of one order, so ranks cannot
//! wait for each other in a circle even where a send blocks until it is received. (Placing each receive just before its
//! use and each send just after its origin, rank by rank, deadlocks such transports.)

use std::collections::BTreeSet;

use crate::{Action, At, Error, Kind, Result, Schedule};

/// Adds sends, receives and waits: [`add_send_recv`], then [`add_waits`].
///
/// # Errors
/// As both.
pub fn lower(schedule: &Schedule) -> Result<Schedule> {
    add_waits(&add_send_recv(schedule)?)
}

/// Adds a send and a receive for everything that one rank makes for another. What a rank makes for itself needs none.
///
/// The order is that of torch's `_add_send_recv`: ranks take turns, ascending, one action each, and a rank whose next
/// action lacks its input is passed over. An overlap takes one turn; both its messages are sent after it.
///
/// # Errors
/// A schedule with messages, or one whose compute order can never run.
pub fn add_send_recv(schedule: &Schedule) -> Result<Schedule> {
    refuse(schedule, |kind| !kind.is_compute())?;
    let placement = schedule.placement();
    let ranks = placement.ranks();
    let mut lists: Vec<Vec<Action>> =
        (0..ranks).map(|r| Vec::with_capacity(2 * schedule.list(r).len())).collect();
    let mut next = vec![0; ranks as usize];
    let mut made = vec![false; schedule.slots()];
    // The message that a passed-over rank lacks. It takes no further turns until the message is made, so that the
    // work is linear in the actions however long ranks wait.
    let mut lacks = vec![None; ranks as usize];
    let mut turns: BTreeSet<u32> = (0..ranks).collect();
    let mut next_round = BTreeSet::new();
    while !turns.is_empty() {
        while let Some(rank) = turns.pop_first() {
            let r = rank as usize;
            let Some(&action) = schedule.list(rank).get(next[r]) else { continue };
            let missing =
                action.parts().filter_map(|part| part.input(placement)).find(|&m| !made[schedule.slot(m)]);
            if missing.is_some() {
                lacks[r] = missing;
                continue;
            }
            next[r] += 1;
            next_round.insert(rank);
            lists[r].push(action);
            for part in action.parts() {
                let Some(output) = part.output(placement) else { continue };
                made[schedule.slot(output)] = true;
                let to = placement.owner(output.stage);
                if to == rank {
                    continue;
                }
                lists[r].push(Action { kind: Kind::Send(output.flow), ..part });
                lists[to as usize].push(Action::new(
                    output.stage,
                    Kind::Recv(output.flow),
                    output.microbatch,
                ));
                if lacks[to as usize] == Some(output) {
                    lacks[to as usize] = None;
                    // Ranks above this one are still to come in this round.
                    let round = if to > rank { &mut turns } else { &mut next_round };
                    round.insert(to);
                }
            }
        }
        std::mem::swap(&mut turns, &mut next_round);
    }
    let stuck = (0..ranks).zip(lacks).find_map(|(rank, lacks)| Some((rank, lacks?)));
    if let Some((rank, needs)) = stuck {
        let index = next[rank as usize];
        return Err(Error::Stuck { at: At { rank, index, action: schedule.list(rank)[index] }, needs });
    }
    Ok(schedule.with_lists(lists))
}

/// Adds the waits: for a receive just before the action that uses it, for a send just before the stage's next send in
/// the same direction (so at most one is in flight), and for the last ones at the end.
///
/// # Errors
/// A schedule that has waits.
pub fn add_waits(schedule: &Schedule) -> Result<Schedule> {
    refuse(schedule, |kind| matches!(kind, Kind::WaitSend(_) | Kind::WaitRecv(_)))?;
    let placement = schedule.placement();
    let wait_list = |rank| {
        let mut list = Vec::with_capacity(2 * schedule.list(rank).len());
        let mut in_flight: Vec<Option<Action>> = vec![None; 2 * placement.stages_of(rank).len()];
        for &action in schedule.list(rank) {
            for part in action.parts() {
                if let Some(input) = part.input(placement)
                    && placement.ends(input).0 != rank
                {
                    list.push(Action { kind: Kind::WaitRecv(input.flow), ..part });
                }
            }
            if let Kind::Send(flow) = action.kind {
                let wait = Action { kind: Kind::WaitSend(flow), ..action };
                list.extend(in_flight[2 * placement.local(action.stage) + flow as usize].replace(wait));
            }
            list.push(action);
        }
        list.extend(in_flight.into_iter().flatten());
        list
    };
    Ok(schedule.with_lists((0..placement.ranks()).map(wait_list).collect()))
}

fn refuse(schedule: &Schedule, present: impl Fn(Kind) -> bool) -> Result<()> {
    match schedule.actions().find(|at| present(at.action.kind)) {
        Some(at) => Err(Error::AlreadyLowered { at }),
        None => Ok(()),
    }
}
