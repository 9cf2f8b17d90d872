//! What a program keeps, in bytes.

use crate::{Error, Kind, Pass, Program, Result};

/// What one micro-batch keeps on one stage. Bytes, or any other unit, the same everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StageMemory {
    /// From `F` to `B`, or to `I`.
    pub activation: u64,
    /// From `I` to `W`: what the weight gradients need.
    pub deferred: u64,
}

impl Program {
    /// The most that each rank ever keeps for backward passes, `memory[s]` being what stage `s` does. Messages under way are not in
    /// it, nor what an action needs only while it runs. It depends on the order alone, not on times.
    ///
    /// # Errors
    /// Another number of stages, or sums beyond 64 bits.
    pub fn peak_memory(&self, memory: &[StageMemory]) -> Result<Vec<u64>> {
        let placement = self.schedule().placement();
        let (expected, got) = (placement.stages() as usize, memory.len());
        if expected != got {
            return Err(Error::CostCount { what: "stages", expected, got });
        }
        let mut peaks = vec![0_u64; placement.ranks() as usize];
        if self.schedule().pass() == Pass::ForwardOnly {
            return Ok(peaks);
        }
        let mut now = peaks.clone();
        for at in self.schedule().actions() {
            let (now, peak) = (&mut now[at.rank as usize], &mut peaks[at.rank as usize]);
            for part in at.action.parts() {
                let StageMemory { activation, deferred } = memory[part.stage as usize];
                let (freed, kept) = match part.kind {
                    Kind::Forward => (0, activation),
                    Kind::Backward => (activation, 0),
                    Kind::BackwardInput => (activation, deferred),
                    Kind::BackwardWeight => (deferred, 0),
                    _ => (0, 0),
                };
                // What is freed was kept: a program frees only what it has made.
                *now = (*now - freed).checked_add(kept).ok_or(Error::MemoryOverflow { at })?;
                *peak = (*now).max(*peak);
            }
        }
        Ok(peaks)
    }
}
