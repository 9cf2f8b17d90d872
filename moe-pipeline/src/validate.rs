//! The proof that a schedule runs: the only way to a [`Program`].
//!
//! Two passes, each linear in the number of actions. The *ledger* walks each rank's list, follows every activation,
//! gradient and message through its states, and counts what is kept. The *rendezvous* executes the messages of all ranks
//! against each other, in program order, with sends and receives that block until they meet; over transports that block
//! less, the same lists run as well.

use crate::{Action, At, Error, Flow, Kind, Message, Pass, Result, Schedule};

/// A schedule that was found to be correct. Only [`validate`] makes one, and only it can be executed or simulated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    schedule: Schedule,
    peak: Vec<u32>,
    order: Vec<u32>,
}

impl Program {
    /// The schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The most activations each rank ever keeps: forward passes whose backward (or `W`) is still to come, of all its
    /// stages. It depends on the order alone, not on times.
    pub fn peak_in_flight(&self) -> &[u32] {
        &self.peak
    }

    /// The actions of all ranks in one order in which they can run: each rank's in program order, and each send and
    /// receive before the waits for them.
    pub(crate) fn global_order(&self) -> impl Iterator<Item = At> {
        let mut next = vec![0; self.peak.len()];
        self.order.iter().map(move |&rank| {
            let index = next[rank as usize];
            next[rank as usize] += 1;
            At { rank, index, action: self.schedule.list(rank)[index] }
        })
    }
}

/// Checks a lowered schedule, and that no rank ever keeps more than `budget` activations.
///
/// A schedule passes if and only if
/// - every micro-batch goes exactly once through `F`, and through `B` or `I` and `W`, of every stage, and each of the
///   three ascends in the micro-batch per stage: sums do not depend on the schedule;
/// - each action comes after those it needs: `I` after `F`, `W` after `I`, a use after its `WAIT_RECV` or, where the
///   neighbouring stage is on the same rank, after the action that made it; a send after what it sends, a wait after
///   what it waits for; and the parts of an overlap do not need each other;
/// - each send meets exactly one receive, each is waited for exactly once, so each buffer is released exactly once;
/// - ranks that execute their lists in program order with blocking sends and receives all reach the end.
///
/// Then they also reach it where neighbouring sends and receives are posted as one batch, which blocks until all of it has
/// met (NCCL's groups). For suppose that they did not: of the messages still to come, take the one that met first in program
/// order. All that is before it in the lists of both its ranks met earlier, so both ranks have posted the batches that it is
/// in, and it meets.
///
/// # Errors
/// The first action that breaks a rule, with its rank and index.
pub fn validate(schedule: Schedule, budget: Option<u32>) -> Result<Program> {
    let peak = Ledger::new(&schedule).balance(budget)?;
    let order = rendezvous(&schedule)?;
    Ok(Program { schedule, peak, order })
}

/// A message at its sender.
#[derive(Clone, Copy, PartialEq)]
enum Outgoing {
    Nothing,
    Made,
    Sent,
    Released,
}

/// A message at its receiver. Between stages of one rank it goes from `Nothing` to `Ready`.
#[derive(Clone, Copy, PartialEq)]
enum Incoming {
    Nothing,
    Posted,
    Ready,
}

/// What has happened so far.
struct Ledger<'a> {
    schedule: &'a Schedule,
    /// Per stage, the next micro-batch of each sum.
    forward: Vec<u32>,
    backward_input: Vec<u32>,
    backward_weight: Vec<u32>,
    outgoing: Vec<Outgoing>,
    incoming: Vec<Incoming>,
}

impl<'a> Ledger<'a> {
    fn new(schedule: &'a Schedule) -> Self {
        let first: Vec<u32> =
            (0..schedule.placement().stages()).map(|stage| schedule.microbatches_of(stage).start).collect();
        Ledger {
            schedule,
            forward: first.clone(),
            backward_input: first.clone(),
            backward_weight: first,
            outgoing: vec![Outgoing::Nothing; schedule.slots()],
            incoming: vec![Incoming::Nothing; schedule.slots()],
        }
    }

    /// Walks every list; the peak of each rank.
    fn balance(mut self, budget: Option<u32>) -> Result<Vec<u32>> {
        let mut peaks = vec![0; self.schedule.placement().ranks() as usize];
        let mut in_flight = vec![0; peaks.len()];
        for whole in self.schedule.actions() {
            self.independent(whole)?;
            for at in whole.action.parts().map(|action| At { action, ..whole }) {
                self.step(at)?;
                let (now, peak) = (&mut in_flight[at.rank as usize], &mut peaks[at.rank as usize]);
                match at.action.kind {
                    Kind::Forward if self.schedule.pass() == Pass::ForwardBackward => *now += 1,
                    Kind::Backward | Kind::BackwardWeight => *now -= 1,
                    _ => {}
                }
                *peak = (*now).max(*peak);
                if let Some(budget) = budget.filter(|&budget| *now > budget) {
                    return Err(Error::OverBudget { at, in_flight: *now, budget });
                }
            }
        }
        self.close()?;
        Ok(peaks)
    }

    /// The parts of an overlap run at the same time, so the `B` cannot need the `F`. It does only if both are of one stage
    /// and micro-batch: no message of the other flow comes or goes between them.
    fn independent(&self, at: At) -> Result<()> {
        match at.action.kind {
            Kind::Overlap { stage, microbatch }
                if (stage, microbatch) == (at.action.stage, at.action.microbatch) =>
            {
                Err(Error::Premature { at, needs: Action { kind: Kind::Forward, ..at.action } })
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, at: At) -> Result<()> {
        let action = at.action;
        let (stage, m) = (action.stage as usize, action.microbatch);
        let after = |done: u32, kind| match m < done {
            true => Ok(()),
            false => Err(Error::Premature { at, needs: Action { kind, ..action } }),
        };
        match action.kind {
            Kind::Forward => in_turn(at, &mut self.forward[stage])?,
            Kind::BackwardInput => {
                after(self.forward[stage], Kind::Forward)?;
                in_turn(at, &mut self.backward_input[stage])?;
            }
            Kind::BackwardWeight => {
                after(self.backward_input[stage], Kind::BackwardInput)?;
                in_turn(at, &mut self.backward_weight[stage])?;
            }
            Kind::Backward => {
                after(self.forward[stage], Kind::Forward)?;
                in_turn(at, &mut self.backward_input[stage])?;
                in_turn(at, &mut self.backward_weight[stage])?;
            }
            _ => return self.carry(at),
        }
        self.take_input(at)?;
        self.make_output(at);
        Ok(())
    }

    /// What arrived is used once, because the action that uses it occurs once.
    fn take_input(&self, at: At) -> Result<()> {
        let Some(input) = at.action.input(self.schedule.placement()) else { return Ok(()) };
        if self.incoming[self.schedule.slot(input)] != Incoming::Ready {
            let (from, to) = self.schedule.placement().ends(input);
            let needs = match from == to {
                true => maker(input),
                false => Action { kind: Kind::WaitRecv(input.flow), ..at.action },
            };
            return Err(Error::Premature { at, needs });
        }
        Ok(())
    }

    fn make_output(&mut self, at: At) {
        let Some(output) = at.action.output(self.schedule.placement()) else { return };
        let (from, to) = self.schedule.placement().ends(output);
        let slot = self.schedule.slot(output);
        match from == to {
            true => self.incoming[slot] = Incoming::Ready,
            false => self.outgoing[slot] = Outgoing::Made,
        }
    }

    /// A message action: one state further, from exactly the state before it.
    fn carry(&mut self, at: At) -> Result<()> {
        let message = message(self.schedule, at.action);
        let slot = self.schedule.slot(message);
        let (outgoing, incoming) = (&mut self.outgoing[slot], &mut self.incoming[slot]);
        let premature = |needs| Err(Error::Premature { at, needs });
        match at.action.kind {
            Kind::Send(_) => match *outgoing {
                Outgoing::Nothing => return premature(maker(message)),
                Outgoing::Made => *outgoing = Outgoing::Sent,
                Outgoing::Sent | Outgoing::Released => return Err(Error::Duplicate { at }),
            },
            Kind::WaitSend(flow) => match *outgoing {
                Outgoing::Nothing | Outgoing::Made => {
                    return premature(Action { kind: Kind::Send(flow), ..at.action });
                }
                Outgoing::Sent => *outgoing = Outgoing::Released,
                Outgoing::Released => return Err(Error::Duplicate { at }),
            },
            Kind::Recv(_) => match *incoming {
                Incoming::Nothing => *incoming = Incoming::Posted,
                Incoming::Posted | Incoming::Ready => return Err(Error::Duplicate { at }),
            },
            Kind::WaitRecv(flow) => match *incoming {
                Incoming::Nothing => return premature(Action { kind: Kind::Recv(flow), ..at.action }),
                Incoming::Posted => *incoming = Incoming::Ready,
                Incoming::Ready => return Err(Error::Duplicate { at }),
            },
            _ => unreachable!("compute actions carry no message"),
        }
        Ok(())
    }

    /// At the end nothing is left to do. (Whatever was used was received and waited for, so receives need no look.)
    fn close(&self) -> Result<()> {
        let placement = self.schedule.placement();
        for stage in 0..placement.stages() {
            let s = stage as usize;
            let rank = placement.owner(stage);
            let all = self.schedule.microbatches_of(stage);
            let backward = match self.schedule.pass() {
                Pass::ForwardBackward => all.end,
                Pass::ForwardOnly => all.start,
            };
            for (done, target, kind) in [
                (self.forward[s], all.end, Kind::Forward),
                (self.backward_input[s], backward, Kind::Backward),
                (self.backward_weight[s], backward, Kind::BackwardWeight),
            ] {
                if done < target {
                    return Err(Error::Missing { rank, action: Action::new(stage, kind, done) });
                }
            }
            for microbatch in all {
                for kind in [Kind::Forward, Kind::Backward] {
                    let action = Action::new(stage, kind, microbatch);
                    let Some(output) = action.output(placement) else { continue };
                    let kind = match self.outgoing[self.schedule.slot(output)] {
                        Outgoing::Made => Kind::Send(output.flow),
                        Outgoing::Sent => Kind::WaitSend(output.flow),
                        Outgoing::Nothing | Outgoing::Released => continue,
                    };
                    return Err(Error::Missing { rank, action: Action { kind, ..action } });
                }
            }
        }
        Ok(())
    }
}

/// Advances a sum whose next micro-batch must be the action's.
fn in_turn(at: At, next: &mut u32) -> Result<()> {
    let m = at.action.microbatch;
    if m < *next {
        return Err(Error::Duplicate { at });
    }
    if m > *next {
        return Err(Error::OutOfOrder { at, expected: *next });
    }
    *next += 1;
    Ok(())
}

/// The action that makes a message of an existing boundary. (`I` may stand for `B`.)
fn maker(message: Message) -> Action {
    match message.flow {
        Flow::Forward => Action::new(message.stage - 1, Kind::Forward, message.microbatch),
        Flow::Backward => Action::new(message.stage + 1, Kind::Backward, message.microbatch),
    }
}

/// The message of a message action of a schedule.
fn message(schedule: &Schedule, action: Action) -> Message {
    action.message(schedule.placement()).expect("Schedule::new checks that messages cross a boundary")
}

/// Executes all lists with blocking sends and receives; the order in which it went, as ranks.
fn rendezvous(schedule: &Schedule) -> Result<Vec<u32>> {
    let ranks = schedule.placement().ranks();
    let mut next = vec![0; ranks as usize];
    let mut order = Vec::new();
    let current = |next: &[usize], rank: u32| schedule.list(rank).get(next[rank as usize]).copied();
    let mut runnable: Vec<u32> = (0..ranks).rev().collect();
    while let Some(rank) = runnable.pop() {
        while let Some(action) = current(&next, rank) {
            if matches!(action.kind, Kind::Send(_) | Kind::Recv(_)) {
                let (peer, counterpart) = counterpart(schedule, action);
                if current(&next, peer) != Some(counterpart) {
                    break;
                }
                next[peer as usize] += 1;
                order.push(peer);
                runnable.push(peer);
            }
            next[rank as usize] += 1;
            order.push(rank);
        }
    }
    let stuck = |rank| {
        let index = next[rank as usize];
        schedule.list(rank).get(index).map(|&action| At { rank, index, action })
    };
    let Some(first) = (0..ranks).find_map(stuck) else { return Ok(order) };
    // Each stuck rank waits for a peer that is stuck too: the ledger has seen both ends of every message, and the
    // peer's is still to come. Following them as many times as there are ranks ends inside the circle.
    let waits_for = |at: At| stuck(counterpart(schedule, at.action).0).unwrap_or(at);
    let entry = (0..ranks).fold(first, |at, _| waits_for(at));
    let mut cycle = vec![entry];
    let mut at = waits_for(entry);
    while at.rank != entry.rank {
        cycle.push(at);
        at = waits_for(at);
    }
    Err(Error::Deadlock { cycle })
}

/// The other end of a send or receive.
fn counterpart(schedule: &Schedule, action: Action) -> (u32, Action) {
    let message = message(schedule, action);
    let (from, to) = schedule.placement().ends(message);
    match action.kind {
        Kind::Send(flow) => (to, Action { stage: message.stage, kind: Kind::Recv(flow), ..action }),
        Kind::Recv(flow) => (from, Action { stage: maker(message).stage, kind: Kind::Send(flow), ..action }),
        _ => unreachable!("only sends and receives have another end"),
    }
}
