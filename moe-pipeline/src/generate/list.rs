//! A schedule for measured costs.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::Range;

use super::{Named, Sizes};
use crate::{
    Action, Costs, Error, Kind, Message, Pass, Placement, Result, Schedule, lower, simulate, validate,
};

/// The shortest step that is found for a placement and measured costs, with at most `budget` activations of a stage kept per rank.
///
/// Tried are lists made by what is ready first at these costs, under several rules of what to prefer, and the published schedules
/// of the same placement that keep no more; so it is at least as good as each of those at these costs. (Those with groups of
/// micro-batches are tried in groups of p, of all, and [without a group](Sizes::group), where these are legal.) Backward passes are
/// split, so a stage must be able to. Overlaps are made only by the published schedules that have them.
///
/// # Errors
/// No micro-batch; costs that [`simulate`](crate::simulate()) refuses; or fewer activations than a rank has stages: one micro-batch
/// could not go through.
pub fn for_costs(placement: &Placement, microbatches: u32, costs: &Costs, budget: u32) -> Result<Schedule> {
    if microbatches == 0 {
        return Err(Error::Empty { what: "micro-batch" });
    }
    costs.check(placement.stages() as usize)?;
    let stages = |rank| placement.stages_of(rank).len() as u32;
    if let Some(rank) = (0..placement.ranks()).find(|&rank| stages(rank) > budget) {
        return Err(Error::TooFewActivations { rank, stages: stages(rank), budget });
    }
    let mut best: Option<(f64, Schedule)> = None;
    let mut offer = |schedule: Schedule| -> Result<()> {
        let program = match validate(lower(&schedule)?, Some(budget)) {
            Err(Error::OverBudget { .. }) => return Ok(()),
            program => program?,
        };
        let step = simulate(&program, costs)?.makespan;
        if best.as_ref().is_none_or(|(shortest, _)| step < *shortest) {
            best = Some((step, schedule));
        }
        Ok(())
    };
    let (ranks, virtual_stages) = (placement.ranks(), placement.stages() / placement.ranks());
    let sizes = Sizes { ranks, virtual_stages, microbatches, group: None };
    let mut groups = vec![sizes.group_or_default(), ranks, microbatches];
    groups.sort_unstable();
    groups.dedup();
    let own = |named: &Named| named.placement(ranks, virtual_stages).as_ref() == Ok(placement);
    for named in Named::ALL.iter().copied().filter(own) {
        let has_groups = named.has_groups() && virtual_stages > 1;
        for &group in if has_groups { &groups[..] } else { &groups[..1] } {
            // Sizes that a published schedule is not made for do not keep the others from being tried.
            if let Ok(schedule) = named.generate(Sizes { group: Some(group), ..sizes }) {
                offer(schedule)?;
            }
        }
    }
    for deep_first in [true, false] {
        for patient in [true, false] {
            let lists =
                Run::new(placement, microbatches, costs, budget, Rule { deep_first, patient }).lists();
            offer(Schedule::new(placement.clone(), microbatches, Pass::ForwardBackward, lists)?)?;
        }
    }
    Ok(best.expect("a list that keeps no more was offered").1)
}

/// What to prefer of what is ready. Input gradients always come first.
#[derive(Clone, Copy)]
struct Rule {
    /// Forward passes of later stages before those of earlier ones.
    deep_first: bool,
    /// Rather idle than be at a weight gradient when something arrives.
    patient: bool,
}

/// A rank that may have something to do.
#[derive(PartialEq)]
struct Wake {
    time: f64,
    rank: u32,
}

impl Eq for Wake {}

impl Ord for Wake {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time.total_cmp(&other.time).then(self.rank.cmp(&other.rank))
    }
}

impl PartialOrd for Wake {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// How far a stage is: the next micro-batch of each kind.
struct Progress {
    stage: u32,
    start: u32,
    end: u32,
    forward: u32,
    input: u32,
}

/// How far a rank is.
struct Rank {
    stages: Vec<Progress>,
    busy_until: f64,
    /// Forward passes whose input gradient is still to come.
    in_flight: u32,
    /// Weight gradients still to come.
    deferred: VecDeque<(u32, u32)>,
    list: Vec<Action>,
}

/// A run in the making.
struct Run<'a> {
    placement: &'a Placement,
    costs: &'a Costs,
    budget: u32,
    rule: Rule,
    microbatches: u32,
    ranks: Vec<Rank>,
    /// When messages arrive, by flow, stage and micro-batch.
    arrivals: Vec<Option<f64>>,
    /// When the link from one rank to another is free.
    links: HashMap<(u32, u32), f64>,
}

impl<'a> Run<'a> {
    fn new(placement: &'a Placement, microbatches: u32, costs: &'a Costs, budget: u32, rule: Rule) -> Self {
        let progress = |&stage: &u32| {
            let Range { start, end } = placement.microbatches_of(stage, microbatches);
            Progress { stage, start, end, forward: start, input: start }
        };
        let rank = |rank| Rank {
            stages: placement.stages_of(rank).iter().map(progress).collect(),
            busy_until: 0.0,
            in_flight: 0,
            deferred: VecDeque::new(),
            list: Vec::new(),
        };
        let ranks = (0..placement.ranks()).map(rank).collect();
        let arrivals = vec![None; 2 * placement.stages() as usize * microbatches as usize];
        Run { placement, costs, budget, rule, microbatches, ranks, arrivals, links: HashMap::new() }
    }

    fn lists(mut self) -> Vec<Vec<Action>> {
        let mut wakes: BinaryHeap<Reverse<Wake>> =
            (0..self.placement.ranks()).map(|rank| Reverse(Wake { time: 0.0, rank })).collect();
        while let Some(Reverse(Wake { time, rank })) = wakes.pop() {
            if self.ranks[rank as usize].busy_until > time {
                continue;
            }
            let Some(action) = self.choose(rank, time) else { continue };
            let end = time + self.costs.pass(action);
            self.ranks[rank as usize].take(action, end);
            wakes.push(Reverse(Wake { time: end, rank }));
            if let Some(output) = action.output(self.placement) {
                let (from, to) = self.placement.ends(output);
                let time = self.send(output, from, to, end);
                wakes.push(Reverse(Wake { time, rank: to }));
            }
        }
        self.ranks.into_iter().map(|rank| rank.list).collect()
    }

    fn slot(&self, message: Message) -> usize {
        let row = message.flow as usize * self.placement.stages() as usize + message.stage as usize;
        row * self.microbatches as usize + message.microbatch as usize
    }

    /// Sends what was made at `made`; when it arrives.
    fn send(&mut self, message: Message, from: u32, to: u32, made: f64) -> f64 {
        let mut arrives = made;
        if from != to {
            let link = self.costs.links[message.boundary() as usize];
            let free = self.links.entry((from, to)).or_insert(0.0);
            *free = made.max(*free) + link.transfer;
            arrives = *free + link.latency;
        }
        let slot = self.slot(message);
        self.arrivals[slot] = Some(arrives);
        arrives
    }

    /// When the input of an action arrives; none if nobody knows yet.
    fn arrival(&self, action: Action) -> Option<f64> {
        match action.input(self.placement) {
            Some(message) => self.arrivals[self.slot(message)],
            None => Some(0.0),
        }
    }

    /// What `rank` does next at `time`, if it does not wait.
    fn choose(&self, rank: u32, time: f64) -> Option<Action> {
        let rank = &self.ranks[rank as usize];
        let ready = |action: &Action| self.arrival(*action).is_some_and(|arrival| arrival <= time);
        let inputs = rank.stages.iter().filter_map(Progress::next_input);
        if let Some(input) = inputs.filter(ready).min_by_key(|action| action.microbatch) {
            return Some(input);
        }
        let weight = rank.deferred.front().map(|&(stage, m)| Action::new(stage, Kind::BackwardWeight, m));
        let forwards = rank.stages.iter().filter_map(Progress::next_forward);
        let mut forwards = forwards.filter(ready).filter(|action| self.fits(rank, *action));
        let forward = if self.rule.deep_first { forwards.next_back() } else { forwards.next() };
        if forward.is_some() && rank.in_flight + (rank.deferred.len() as u32) < self.budget {
            return forward;
        }
        // (If a forward pass lacks memory, this makes some.)
        let weight = weight?;
        let next = rank.stages.iter().flat_map(|stage| [stage.next_input(), stage.next_forward()]).flatten();
        let end = time + self.costs.pass(weight);
        let soon =
            next.filter_map(|action| self.arrival(action)).any(|arrival| arrival > time && arrival < end);
        let wait = self.rule.patient && soon && forward.is_none();
        (!wait).then_some(weight)
    }

    /// Whether after a forward pass this rank could still take all micro-batches through, first those that came first, each
    /// with what is free and what those before it give back. If that holds on every rank, the first one that is unfinished always
    /// goes on, everywhere, and nothing waits for ever. (The banker's algorithm; copies' micro-batches come in turns.)
    fn fits(&self, rank: &Rank, forward: Action) -> bool {
        let Some(mut free) = self.budget.checked_sub(rank.in_flight + 1) else { return false };
        let begun = |stage: &Progress| stage.forward + u32::from(stage.stage == forward.stage);
        let first = rank.stages.iter().map(|stage| stage.input - stage.start).min().unwrap_or(0);
        let last = rank.stages.iter().map(|stage| begun(stage) - stage.start).max().unwrap_or(0);
        for nth in first..last {
            // Enough for any micro-batch, and it only grows.
            if free as usize >= rank.stages.len() {
                return true;
            }
            for of_copy in rank.stages.chunk_by(|a, b| a.start == b.start) {
                let m = of_copy[0].start + nth;
                let lacks = of_copy.iter().filter(|stage| (begun(stage)..stage.end).contains(&m)).count();
                let gives = of_copy.iter().filter(|stage| (stage.input..begun(stage)).contains(&m)).count();
                if lacks as u32 > free {
                    return false;
                }
                free += gives as u32;
            }
        }
        true
    }
}

impl Progress {
    fn next_forward(&self) -> Option<Action> {
        (self.forward < self.end).then(|| Action::new(self.stage, Kind::Forward, self.forward))
    }

    fn next_input(&self) -> Option<Action> {
        (self.input < self.forward).then(|| Action::new(self.stage, Kind::BackwardInput, self.input))
    }
}

impl Rank {
    /// Does an action until `end`.
    fn take(&mut self, action: Action, end: f64) {
        self.busy_until = end;
        self.list.push(action);
        match action.kind {
            Kind::Forward => self.in_flight += 1,
            Kind::BackwardInput => {
                self.in_flight -= 1;
                self.deferred.push_back((action.stage, action.microbatch));
            }
            _ => {
                self.deferred.pop_front();
                return;
            }
        }
        if let Some(progress) = self.stages.iter_mut().find(|progress| progress.stage == action.stage) {
            let next = if action.kind == Kind::Forward { &mut progress.forward } else { &mut progress.input };
            *next += 1;
        }
    }
}
