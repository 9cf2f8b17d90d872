//! What a program costs: when everything happens, and why ranks idle.

use std::collections::HashMap;

use crate::{Action, Error, Flow, Kind, Program, Result};

/// What one micro-batch costs on one stage. Any unit of time, the same everywhere.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageCost {
    /// Time of `F`.
    pub forward: f64,
    /// Time of `I`.
    pub backward_input: f64,
    /// Time of `W`; `B` takes both.
    pub backward_weight: f64,
}

/// What one message costs between two neighbouring stages on different ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Time for which the message occupies the link: bytes / bandwidth. Messages between the same two ranks in the same
    /// direction queue up.
    pub transfer: f64,
    /// Time after that until it has arrived.
    pub latency: f64,
}

impl Link {
    /// A link that takes no time.
    pub const FREE: Link = Link { transfer: 0.0, latency: 0.0 };
}

/// Costs of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Per stage.
    pub stages: Vec<StageCost>,
    /// `links[s]` is between stages `s` and `s + 1`, in either direction: one fewer than stages. Unused where both are
    /// on one rank, or in different copies of the pipeline.
    pub links: Vec<Link>,
    /// What part of the shorter pass of an overlap hides behind the longer one, from 0 (the two take as long as one after
    /// the other) to 1 (as long as the longer one).
    pub overlap: f64,
}

impl Costs {
    /// The same costs for all stages and links; overlaps gain nothing.
    pub fn uniform(stages: u32, stage: StageCost, link: Link) -> Self {
        let stages = stages as usize;
        Costs { stages: vec![stage; stages], links: vec![link; stages.saturating_sub(1)], overlap: 0.0 }
    }

    pub(crate) fn check(&self, stages: usize) -> Result<()> {
        let count = |what, expected, got| match expected == got {
            true => Ok(()),
            false => Err(Error::CostCount { what, expected, got }),
        };
        count("stages", stages, self.stages.len())?;
        count("links", stages.saturating_sub(1), self.links.len())?;
        let of_stages =
            self.stages.iter().map(|c| [c.forward, c.backward_input, c.backward_weight]).enumerate();
        let of_links = self.links.iter().map(|c| [c.transfer, c.latency]).enumerate();
        let values = of_stages
            .flat_map(|(index, values)| values.map(|value| ("stage", index, value)))
            .chain(of_links.flat_map(|(index, values)| values.map(|value| ("link", index, value))));
        for (what, index, value) in values {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::Cost { what, index, value });
            }
        }
        match (0.0..=1.0).contains(&self.overlap) {
            true => Ok(()),
            false => Err(Error::OverlapShare { value: self.overlap }),
        }
    }

    /// How long a compute action takes.
    pub(crate) fn compute(&self, action: Action) -> f64 {
        let cost = &self.stages[action.stage as usize];
        match action.kind {
            Kind::Forward => cost.forward,
            Kind::BackwardInput => cost.backward_input,
            Kind::BackwardWeight => cost.backward_weight,
            Kind::Backward => cost.backward_input + cost.backward_weight,
            Kind::Overlap { stage, .. } => {
                let back = &self.stages[stage as usize];
                let (f, b) = (cost.forward, back.backward_input + back.backward_weight);
                f + b - self.overlap * f.min(b)
            }
            Kind::Send(_) | Kind::Recv(_) | Kind::WaitSend(_) | Kind::WaitRecv(_) => 0.0,
        }
    }
}

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

/// A program in time.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// When the last rank is done.
    pub makespan: f64,
    /// Per rank, its compute actions in program order.
    pub spans: Vec<Vec<Span>>,
    /// Per rank, its idle time; with the spans it fills the makespan.
    pub idle: Vec<Idle>,
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
/// until it is waited for. (Where a send blocks until the receive is posted, a step may take longer.)
///
/// Linear in the number of actions.
///
/// # Errors
/// Costs of the wrong number, negative, or not finite.
pub fn simulate(program: &Program, costs: &Costs) -> Result<Timeline> {
    let schedule = program.schedule();
    let placement = schedule.placement();
    costs.check(placement.stages() as usize)?;
    let ranks = placement.ranks() as usize;
    let mut now = vec![0.0_f64; ranks];
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); ranks];
    let mut idle = vec![Idle::default(); ranks];
    let mut trips = vec![Trip::default(); schedule.slots()];
    let mut link_free = HashMap::new();
    for at in program.global_order() {
        let rank = at.rank as usize;
        let Some(message) = at.action.message(placement) else {
            let end = now[rank] + costs.compute(at.action);
            spans[rank].push(Span { action: at.action, start: now[rank], end });
            now[rank] = end;
            continue;
        };
        let (from, to) = placement.ends(message);
        let trip = &mut trips[schedule.slot(message)];
        match at.action.kind {
            Kind::Send(_) => {
                let link = &costs.links[message.boundary() as usize];
                let free = link_free.entry((from, to)).or_insert(0.0_f64);
                let made = now[rank];
                let sent = made.max(*free) + link.transfer;
                *free = sent;
                *trip = Trip { made, sent, arrived: sent + link.latency };
            }
            Kind::WaitSend(_) => {
                idle[rank].send += (trip.sent - now[rank]).max(0.0);
                now[rank] = now[rank].max(trip.sent);
            }
            Kind::WaitRecv(flow) => {
                let wait = (trip.arrived - now[rank]).max(0.0);
                let exposed = wait.min(trip.arrived - trip.made);
                idle[rank].link += exposed;
                match flow {
                    Flow::Forward => idle[rank].activation += wait - exposed,
                    Flow::Backward => idle[rank].gradient += wait - exposed,
                }
                now[rank] = now[rank].max(trip.arrived);
            }
            _ => {}
        }
    }
    let makespan = now.iter().copied().fold(0.0, f64::max);
    for (idle, now) in idle.iter_mut().zip(now) {
        idle.drain = makespan - now;
    }
    Ok(Timeline { makespan, spans, idle })
}

/// When a message was posted, had left its sender, and arrived.
#[derive(Clone, Copy, Default)]
struct Trip {
    made: f64,
    sent: f64,
    arrived: f64,
}
