//! Lists that are spelled out pass by pass.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use crate::{Action, Kind};

/// A rank's list in the making. Each pass takes the next micro-batch of its kind and stage; those at and beyond the end of
/// the stage's range are left out, so that patterns for many micro-batches serve for few.
#[derive(Default)]
pub(super) struct Turns {
    list: Vec<Action>,
    stages: HashMap<u32, Counts>,
    deferred: VecDeque<(u32, u32)>,
}

struct Counts {
    end: u32,
    forward: u32,
    input: u32,
}

impl Turns {
    /// Of stages with their micro-batches.
    pub(super) fn new(stages: impl IntoIterator<Item = (u32, Range<u32>)>) -> Self {
        let counts = |Range { start, end }| Counts { end, forward: start, input: start };
        let stages = stages.into_iter().map(|(stage, range)| (stage, counts(range))).collect();
        Turns { stages, ..Turns::default() }
    }

    pub(super) fn forward(&mut self, stage: u32) {
        let m = self.next(stage, |counts| &mut counts.forward);
        self.list.extend(m.map(|m| Action::new(stage, Kind::Forward, m)));
    }

    pub(super) fn backward(&mut self, stage: u32) {
        let m = self.next(stage, |counts| &mut counts.input);
        self.list.extend(m.map(|m| Action::new(stage, Kind::Backward, m)));
    }

    /// `I`; its `W` queues up.
    pub(super) fn input(&mut self, stage: u32) {
        if let Some(m) = self.next(stage, |counts| &mut counts.input) {
            self.list.push(Action::new(stage, Kind::BackwardInput, m));
            self.deferred.push_back((stage, m));
        }
    }

    /// The `W` that has queued longest, if any.
    pub(super) fn weight(&mut self) {
        let first = self.deferred.pop_front();
        self.list.extend(first.map(|(stage, m)| Action::new(stage, Kind::BackwardWeight, m)));
    }

    /// The `W` of `stage` that has queued longest, if any.
    pub(super) fn weight_of(&mut self, stage: u32) {
        if let Some(at) = self.deferred.iter().position(|(of, _)| *of == stage) {
            let (_, m) = self.deferred.remove(at).expect("just found");
            self.list.push(Action::new(stage, Kind::BackwardWeight, m));
        }
    }

    pub(super) fn overlap(&mut self, forward: u32, backward: u32) {
        let f = self.next(forward, |counts| &mut counts.forward);
        let b = self.next(backward, |counts| &mut counts.input);
        self.list.extend(f.zip(b).map(|(f, b)| Action::overlap((forward, f), (backward, b))));
    }

    /// All that was done, and every `W` still queued.
    pub(super) fn finish(mut self) -> Vec<Action> {
        while !self.deferred.is_empty() {
            self.weight();
        }
        self.list
    }

    /// All that was done, and every `W` still queued, stage after stage.
    pub(super) fn finish_by_stage(mut self, stages: [u32; 2]) -> Vec<Action> {
        let deferred = std::mem::take(&mut self.deferred);
        for stage in stages {
            let of_stage = deferred.iter().filter(|(of, _)| *of == stage);
            self.list.extend(of_stage.map(|&(stage, m)| Action::new(stage, Kind::BackwardWeight, m)));
        }
        self.list
    }

    fn next(&mut self, stage: u32, of: impl Fn(&mut Counts) -> &mut u32) -> Option<u32> {
        let counts = self.stages.get_mut(&stage)?;
        let end = counts.end;
        let next = of(counts);
        let m = *next;
        *next = m.saturating_add(1);
        (m < end).then_some(m)
    }
}
