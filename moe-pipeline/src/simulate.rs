//! What a program costs: when everything happens, and why ranks idle.

use std::collections::HashMap;

use crate::costs::Costs;
use crate::{Action, Flow, Kind, Message, Program, Result};

/// A compute action in time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// What was done.
    pub action: Action,
    /// When it began; the step begins at 0.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

/// How long a rank computed nothing, by cause.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub struct Idle {
    /// Waiting for the previous stage to make an activation.
    pub activation: f64,
    /// Waiting for the next stage to make a gradient.
    pub gradient: f64,
    /// Waiting for an activation or gradient that was made, but had not arrived: exposed communication.
    pub link: f64,
    /// Waiting for a send to end before the next one.
    pub send: f64,
    /// Done, while other ranks were not.
    pub drain: f64,
}

impl Idle {
    /// All causes together.
    pub fn total(&self) -> f64 {
        self.activation + self.gradient + self.link + self.send + self.drain
    }
}

/// A message in time.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Trip {
    /// What was sent.
    pub message: Message,
    /// The rank that sent it.
    pub from: u32,
    /// The rank that received it.
    pub to: u32,
    /// When it began to occupy the link.
    pub start: f64,
    /// When the link was free for the next one.
    pub sent: f64,
    /// When it had arrived.
    pub arrived: f64,
}

/// A program in time. (To draw passes that were measured, fill in a default one: `makespan` and `spans` do.)
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Timeline {
    /// When the last rank is done.
    pub makespan: f64,
    /// Per rank, its compute actions in program order.
    pub spans: Vec<Vec<Span>>,
    /// The messages, those of one link in the order in which they occupied it.
    pub trips: Vec<Trip>,
    /// Per rank, its idle time; with the spans it fills the makespan.
    pub idle: Vec<Idle>,
    /// Per rank, the part of its spans in which it computed nothing, because it waited for an all-to-all. (Nothing but what
    /// [costs of layers](Costs::of_layers) tell.)
    pub all_to_all: Vec<f64>,
}

impl Timeline {
    /// The part of all ranks' time that is idle, from 0 to 1.
    pub fn bubble_fraction(&self) -> f64 {
        let idle: f64 = self.idle.iter().map(Idle::total).sum();
        let all = self.makespan * self.idle.len() as f64;
        if all > 0.0 { idle / all } else { 0.0 }
    }
}

/// Runs a program on paper: one compute lane per rank, one lane per direction between two ranks. A message leaves when
/// its send is posted and its lane is free, as on streams or over buffered channels, and costs the compute lanes nothing
/// until it is waited for. (Where a send blocks until the receive is posted, a step may take longer.) The lane of a rank's
/// all-to-alls is within its passes, as [`Order::simulate`](crate::weave::Order::simulate) has it.
///
/// Linear in the number of actions.
///
/// # Errors
/// Costs of the wrong number, negative, or not finite; a share of overlaps that is none; or costs of layers of a placement in which
/// the stages of an overlap are not on one rank.
pub fn simulate(program: &Program, costs: &Costs) -> Result<Timeline> {
    let schedule = program.schedule();
    let placement = schedule.placement();
    costs.check(placement.stages() as usize)?;
    let ranks = placement.ranks() as usize;
    let mut now = vec![0.0_f64; ranks];
    let mut timeline = Timeline {
        makespan: 0.0,
        spans: vec![Vec::new(); ranks],
        trips: Vec::new(),
        idle: vec![Idle::default(); ranks],
        all_to_all: vec![0.0; ranks],
    };
    let mut sent: Vec<Option<Sent>> = vec![None; schedule.slots()];
    let mut link_free = HashMap::new();
    for at in program.global_order() {
        let rank = at.rank as usize;
        let (now, idle) = (&mut now[rank], &mut timeline.idle[rank]);
        let Some(message) = at.action.message(placement) else {
            let took = costs.compute(at.action)?;
            timeline.all_to_all[rank] += took.exposed;
            let span = Span { action: at.action, start: *now, end: *now + took.time };
            timeline.spans[rank].push(span);
            *now = span.end;
            continue;
        };
        let sent = &mut sent[schedule.slot(message)];
        match (at.action.kind, *sent) {
            (Kind::Send(_), _) => {
                let (from, to) = placement.ends(message);
                let link = &costs.links[message.boundary() as usize];
                let free = link_free.entry((from, to)).or_insert(0.0_f64);
                let start = now.max(*free);
                *free = start + link.transfer;
                let trip = Trip { message, from, to, start, sent: *free, arrived: *free + link.latency };
                timeline.trips.push(trip);
                *sent = Some(Sent { made: *now, left: trip.sent, arrived: trip.arrived });
            }
            (Kind::WaitSend(_), Some(Sent { left, .. })) => {
                idle.send += (left - *now).max(0.0);
                *now = now.max(left);
            }
            (Kind::WaitRecv(flow), Some(Sent { made, arrived, .. })) => {
                let wait = (arrived - *now).max(0.0);
                let exposed = wait.min(arrived - made);
                idle.link += exposed;
                match flow {
                    Flow::Forward => idle.activation += wait - exposed,
                    Flow::Backward => idle.gradient += wait - exposed,
                }
                *now = now.max(arrived);
            }
            _ => {}
        }
    }
    timeline.makespan = now.iter().copied().fold(0.0, f64::max);
    for (idle, now) in timeline.idle.iter_mut().zip(now) {
        idle.drain = timeline.makespan - now;
    }
    Ok(timeline)
}

/// When a message was posted, had left its sender, and arrived.
#[derive(Clone, Copy)]
struct Sent {
    made: f64,
    left: f64,
    arrived: f64,
}
