//! How many sequences a step has.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A batch that grows while a run is young: Megatron's `--rampup-batch-size start increment samples`.
///
/// With n = (G − start)/increment, a step that starts after c sequences has `start + increment·⌊c·n/samples⌋` of them, and G
/// once c ≥ `samples`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RampUp {
    /// Sequences of the first step.
    pub start: usize,
    /// By how many the batch grows at a time.
    pub increment: usize,
    /// Sequences after which the batch is `global_batch_size`.
    pub samples: u64,
}

impl RampUp {
    /// That every step on the way, of micro-batches of `micro_batch_size` sequences, can be dealt to `dp` data-parallel ranks,
    /// as the last one is known to be.
    ///
    /// # Errors
    /// The number that does not divide, with the nearest ones that do.
    pub fn check_deal(&self, micro_batch_size: usize, dp: usize) -> Result<(), RampUpError> {
        let of = micro_batch_size.saturating_mul(dp).max(1);
        for (name, value) in [("start", self.start), ("increment", self.increment)] {
            if !value.is_multiple_of(of) {
                return Err(RampUpError::Deal { name, value, micro_batch_size, dp, of });
            }
        }
        Ok(())
    }
}

impl fmt::Display for RampUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RampUp { start, increment, samples } = self;
        write!(f, "{{ start = {start}, increment = {increment}, samples = {samples} }}")
    }
}

/// Why a ramp-up was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RampUpError {
    /// A number that is 0.
    #[error("{name} = 0, but it must be at least 1")]
    Zero {
        /// Its name.
        name: &'static str,
    },
    /// There is nothing to ramp up.
    #[error(
        "start = {start}, but it must be below global_batch_size = {global_batch_size}: leave the ramp-up out"
    )]
    Start {
        /// Sequences of the first step.
        start: usize,
        /// Sequences of the last step.
        global_batch_size: usize,
    },
    /// Increments do not lead from one size to the other.
    #[error(
        "global_batch_size - start must be a multiple of increment, but ({global_batch_size} - {start}) % {increment} = \
         {}; the nearest start: {}",
        (global_batch_size - start) % increment,
        nearest(global_batch_size - start, *increment, |way| (*global_batch_size).checked_sub(way).filter(|&s| s > 0))
    )]
    Increment {
        /// Sequences of the first step.
        start: usize,
        /// By how many the batch grows.
        increment: usize,
        /// Sequences of the last step.
        global_batch_size: usize,
    },
    /// A batch on the way cannot be dealt to the data-parallel ranks.
    #[error(
        "{name} must be a multiple of micro_batch_size·dp, but {value} % ({micro_batch_size}·{dp} = {of}) = {}; the \
         nearest: {}",
        value % of,
        nearest(*value, *of, Some)
    )]
    Deal {
        /// `start` or `increment`.
        name: &'static str,
        /// Its value.
        value: usize,
        /// Sequences of a micro-batch.
        micro_batch_size: usize,
        /// Data-parallel ranks.
        dp: usize,
        /// The product.
        of: usize,
    },
}

/// The multiples of `of` on both sides of `value`, as `shown` of those that are some.
fn nearest(value: usize, of: usize, shown: impl Fn(usize) -> Option<usize>) -> String {
    let below = value / of * of;
    let multiples = [below, below.saturating_add(of)].into_iter().filter(|&multiple| multiple > 0);
    multiples.filter_map(shown).map(|multiple| multiple.to_string()).collect::<Vec<_>>().join(", ")
}

/// Sequences of every step of a run, G_t.
///
/// ```
/// use moe_train::data::{BatchSizes, RampUp};
///
/// // 4, 8 and 12 for a third of the 36 sequences each, then 16.
/// let sizes = BatchSizes::new(16, Some(RampUp { start: 4, increment: 4, samples: 36 }))?;
/// let first: Vec<usize> = (1..=8).map(|step| sizes.of_step(step)).collect();
/// assert_eq!(first, [4, 4, 4, 8, 8, 12, 16, 16]);
/// assert_eq!(sizes.cursor(7), 4 + 4 + 4 + 8 + 8 + 12);
/// # Ok::<(), moe_train::data::RampUpError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSizes {
    /// Of rising first step; the first one starts at step 1, the last one has no end.
    legs: Vec<Leg>,
}

/// Steps of equal size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leg {
    /// The first step, from 1.
    step: u64,
    /// Sequences before it.
    cursor: u64,
    size: usize,
}

impl BatchSizes {
    /// `global_batch_size` for every step, or from the end of the ramp-up on.
    ///
    /// # Errors
    /// The ramp-up does not lead there.
    pub fn new(global_batch_size: usize, ramp_up: Option<RampUp>) -> Result<Self, RampUpError> {
        let mut leg = Leg { step: 1, cursor: 0, size: global_batch_size };
        let Some(RampUp { start, increment, samples }) = ramp_up else {
            return Ok(BatchSizes { legs: vec![leg] });
        };
        for (name, zero) in [("start", start == 0), ("increment", increment == 0), ("samples", samples == 0)]
        {
            if zero {
                return Err(RampUpError::Zero { name });
            }
        }
        if start >= global_batch_size {
            return Err(RampUpError::Start { start, global_batch_size });
        }
        let way = global_batch_size - start;
        if !way.is_multiple_of(increment) {
            return Err(RampUpError::Increment { start, increment, global_batch_size });
        }
        let (increments, samples) = ((way / increment) as u128, u128::from(samples));
        let mut legs = Vec::new();
        loop {
            let level = (u128::from(leg.cursor) * increments / samples).min(increments);
            leg.size = start + level as usize * increment;
            legs.push(leg);
            if level == increments {
                return Ok(BatchSizes { legs });
            }
            // The smallest cursor of the next level is at most `samples`.
            let next = ((level + 1) * samples).div_ceil(increments) as u64;
            let steps = (next - leg.cursor).div_ceil(leg.size as u64);
            leg.step += steps;
            leg.cursor = leg.cursor.saturating_add(steps.saturating_mul(leg.size as u64));
        }
    }

    /// Sequences of a step, from 1.
    pub fn of_step(&self, step: u64) -> usize {
        self.leg(step).size
    }

    /// Sequences before a step, from 1: the global index of its first one.
    pub fn cursor(&self, step: u64) -> u64 {
        let leg = self.leg(step);
        leg.cursor.saturating_add(step.saturating_sub(leg.step).saturating_mul(leg.size as u64))
    }

    /// The sizes that steps have, ascending.
    pub fn sizes(&self) -> impl Iterator<Item = usize> {
        self.legs.iter().map(|leg| leg.size)
    }

    fn leg(&self, step: u64) -> Leg {
        self.legs[self.legs.partition_point(|leg| leg.step <= step.max(1)) - 1]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refusal(global_batch_size: usize, start: usize, increment: usize, samples: u64) -> String {
        BatchSizes::new(global_batch_size, Some(RampUp { start, increment, samples }))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn without_a_ramp_all_steps_are_equal() {
        let sizes = BatchSizes::new(6, None).unwrap();
        assert_eq!((sizes.of_step(1), sizes.of_step(u64::MAX / 6)), (6, 6));
        assert_eq!((sizes.cursor(0), sizes.cursor(1), sizes.cursor(11)), (0, 0, 60));
    }

    #[test]
    fn what_leads_nowhere_is_refused() {
        assert_eq!(refusal(8, 0, 2, 9), "start = 0, but it must be at least 1");
        assert_eq!(refusal(8, 2, 0, 9), "increment = 0, but it must be at least 1");
        assert_eq!(refusal(8, 2, 2, 0), "samples = 0, but it must be at least 1");
        assert!(refusal(8, 8, 2, 9).starts_with("start = 8, but it must be below global_batch_size = 8"));
        assert_eq!(
            refusal(32, 3, 8, 9),
            "global_batch_size - start must be a multiple of increment, but (32 - 3) % 8 = 5; the nearest start: 8"
        );
        assert!(refusal(32, 11, 8, 9).ends_with("(32 - 11) % 8 = 5; the nearest start: 16, 8"));
        let ramp_up = RampUp { start: 6, increment: 5, samples: 9 };
        RampUp { increment: 4, ..ramp_up }.check_deal(1, 2).unwrap();
        assert_eq!(
            ramp_up.check_deal(2, 2).unwrap_err().to_string(),
            "start must be a multiple of micro_batch_size·dp, but 6 % (2·2 = 4) = 2; the nearest: 4, 8"
        );
        assert_eq!(
            ramp_up.check_deal(2, 3).unwrap_err().to_string(),
            "increment must be a multiple of micro_batch_size·dp, but 5 % (2·3 = 6) = 5; the nearest: 6"
        );
    }

    /// Megatron's rule as it is written there, with its divisions in floating point made exact: `samples` per increment is
    /// a fraction.
    fn by_the_rule(global_batch_size: usize, ramp_up: RampUp, consumed: u64) -> usize {
        let RampUp { start, increment, samples } = ramp_up;
        if consumed >= samples {
            return global_batch_size;
        }
        let increments = (global_batch_size - start) / increment;
        // How many whole shares of samples/increments fit into what was consumed.
        let whole = (0..=increments).rev().find(|&k| k as u64 * samples <= consumed * increments as u64);
        start + whole.unwrap() * increment
    }

    proptest! {
        #[test]
        fn every_step_follows_the_rule(start in 1_usize..20, increment in 1_usize..9, n in 1_usize..9, samples in 1_u64..400) {
            let ramp_up = RampUp { start, increment, samples };
            let global = start + n * increment;
            let sizes = BatchSizes::new(global, Some(ramp_up)).unwrap();
            let mut consumed = 0;
            for step in 1..=samples + 2 {
                prop_assert_eq!(sizes.cursor(step), consumed, "step {}", step);
                let size = by_the_rule(global, ramp_up, consumed);
                prop_assert_eq!(sizes.of_step(step), size, "step {}", step);
                consumed += size as u64;
            }
            let all: Vec<usize> = sizes.sizes().collect();
            prop_assert!(all.is_sorted_by(|a, b| a < b));
            prop_assert_eq!(all.last(), Some(&global));
        }
    }
}
