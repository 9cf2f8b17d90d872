//! What a program keeps, in bytes.

use crate::{Action, Error, Kind, Pass, Program, Result, Span, Timeline};

/// What one micro-batch keeps on one stage. Bytes, or any other unit, the same everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StageMemory {
    /// From `F` to `B`, or to `I`.
    pub activation: u64,
    /// From `I` to `W`: what the weight gradients need.
    pub deferred: u64,
}

/// What a rank keeps from a moment on.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Level {
    /// The moment.
    pub from: f64,
    /// Bytes, until the next level.
    pub bytes: u64,
}

/// What an action, or a part of an overlap, frees and then keeps.
fn freed_and_kept(part: Action, memory: &[StageMemory]) -> (u64, u64) {
    let StageMemory { activation, deferred } = memory[part.stage as usize];
    match part.kind {
        Kind::Forward => (0, activation),
        Kind::Backward => (activation, 0),
        Kind::BackwardInput => (activation, deferred),
        Kind::BackwardWeight => (deferred, 0),
        _ => (0, 0),
    }
}

impl Program {
    /// The most that each rank ever keeps for backward passes, `memory[s]` being what stage `s` does. Messages under way are not in
    /// it, nor what an action needs only while it runs: a `B`, also that of an overlap, what the weight gradients need that it has
    /// not added yet ([`Order::deferred`](crate::weave::Order::deferred) says of how many nodes, if it is woven). It depends on the
    /// order alone, not on times.
    ///
    /// # Errors
    /// Another number of stages, or sums beyond 64 bits.
    pub fn peak_memory(&self, memory: &[StageMemory]) -> Result<Vec<u64>> {
        self.check_stages(memory)?;
        let mut peaks = vec![0_u64; self.schedule().placement().ranks() as usize];
        if self.schedule().pass() == Pass::ForwardOnly {
            return Ok(peaks);
        }
        let mut now = peaks.clone();
        for at in self.schedule().actions() {
            let (now, peak) = (&mut now[at.rank as usize], &mut peaks[at.rank as usize]);
            for part in at.action.parts() {
                let (freed, kept) = freed_and_kept(part, memory);
                // What is freed was kept: a program frees only what it has made.
                *now = (*now - freed).checked_add(kept).ok_or(Error::MemoryOverflow { at })?;
                *peak = (*now).max(*peak);
            }
        }
        Ok(peaks)
    }

    /// The same over time, each rank's levels in order: an activation is kept from the beginning of its `F` on, and what a
    /// backward pass frees is kept until its end. The highest level is that of [`peak_memory`](Program::peak_memory).
    ///
    /// # Errors
    /// As [`peak_memory`](Program::peak_memory), or a timeline that is not of this program.
    ///
    /// ```
    /// use moe_pipeline::{Costs, Link, StageCost, StageMemory, generate, lower, simulate, validate};
    ///
    /// let program = validate(lower(&generate::one_f_one_b(2, 2)?)?, None)?;
    /// let cost = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    /// let timeline = simulate(&program, &Costs::uniform(2, cost, Link::FREE))?;
    /// let memory = [StageMemory { activation: 10, deferred: 4 }; 2];
    /// let levels = program.memory_over_time(&timeline, &memory)?;
    /// let levels: Vec<_> = levels[1].iter().map(|level| (level.from, level.bytes)).collect();
    /// assert_eq!(levels, [(1.0, 10), (4.0, 0), (4.0, 10), (7.0, 0)]);
    /// # Ok::<(), moe_pipeline::Error>(())
    /// ```
    pub fn memory_over_time(&self, timeline: &Timeline, memory: &[StageMemory]) -> Result<Vec<Vec<Level>>> {
        self.peak_memory(memory)?;
        self.check_timeline(timeline)?;
        if self.schedule().pass() == Pass::ForwardOnly {
            return Ok(vec![Vec::new(); timeline.spans.len()]);
        }
        let of_rank = |spans: &Vec<Span>| {
            let mut levels: Vec<Level> = Vec::new();
            let mut bytes = 0;
            for span in spans {
                for part in span.action.parts() {
                    let (freed, kept) = freed_and_kept(part, memory);
                    bytes = bytes - freed + kept;
                    let from = if part.kind == Kind::Forward { span.start } else { span.end };
                    levels.push(Level { from, bytes });
                }
            }
            levels
        };
        Ok(timeline.spans.iter().map(of_rank).collect())
    }

    /// The levels of a program's own passes neither overflow nor fall below nothing.
    fn check_timeline(&self, timeline: &Timeline) -> Result<()> {
        let same = |rank: u32| {
            let passes = self.schedule().list(rank).iter().filter(|action| action.kind.is_compute());
            let spans = timeline.spans.get(rank as usize).map_or(&[][..], Vec::as_slice);
            passes.eq(spans.iter().map(|span| &span.action))
        };
        let ranks = timeline.spans.len().max(self.schedule().placement().ranks() as usize) as u32;
        match (0..ranks).find(|&rank| !same(rank)) {
            Some(rank) => Err(Error::OtherTimeline { rank }),
            None => Ok(()),
        }
    }

    fn check_stages(&self, memory: &[StageMemory]) -> Result<()> {
        let (expected, got) = (self.schedule().placement().stages() as usize, memory.len());
        match expected == got {
            true => Ok(()),
            false => Err(Error::CostCount { what: "stages", expected, got }),
        }
    }
}
