//! Which samples make up which micro-batch of which step.

use std::ops::Range;

use super::{BatchSizes, Blend, Permutation, Place};

/// Which sample a global index `g`, from 0, has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Of one dataset: sample `π(seed, q)(g mod n)` of epoch `q = ⌊g/n⌋`.
    Single {
        /// The seed.
        seed: u64,
        /// Samples of the dataset, n, not 0.
        samples: u64,
    },
    /// Of several datasets.
    Blend(Blend),
}

impl Order {
    /// The sample at a global index.
    pub fn at(&self, g: u64) -> Place {
        match self {
            &Order::Single { seed, samples } => {
                let sample = Permutation::new(seed, g / samples, samples).at(g % samples);
                Place { dataset: 0, sample }
            }
            Order::Blend(blend) => blend.at(g),
        }
    }
}

/// The samples of each step, by a global index `g` from 0 that is all the state there is.
///
/// Step `t` (from 1) uses the next `G_t` indices; its micro-batch `u` the sequences `ub … ub+b−1` of these. Data-parallel
/// rank `d` of DP runs `u = j·DP + d`, `j` ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sampler {
    order: Order,
    batch_sizes: BatchSizes,
    micro_batch_size: u64,
}

impl Sampler {
    /// For b `micro_batch_size`, not 0, a divisor of every batch size.
    pub fn new(order: Order, batch_sizes: BatchSizes, micro_batch_size: usize) -> Self {
        Sampler { order, batch_sizes, micro_batch_size: micro_batch_size as u64 }
    }

    /// The sample of each global index.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// The first global index of a step, from 1: the cursor before it.
    pub fn cursor(&self, step: u64) -> u64 {
        self.batch_sizes.cursor(step)
    }

    /// The global indices of micro-batch `u` of a step.
    pub fn indices(&self, step: u64, u: usize) -> Range<u64> {
        let start = self.cursor(step) + u as u64 * self.micro_batch_size;
        start..start + self.micro_batch_size
    }

    /// The samples of micro-batch `u` of a step.
    pub fn micro_batch(&self, step: u64, u: usize) -> impl Iterator<Item = Place> {
        self.indices(step, u).map(|g| self.order.at(g))
    }

    /// The micro-batches of a step that data-parallel rank `d` of `dp` runs, ascending.
    pub fn of_rank(&self, step: u64, d: usize, dp: usize) -> impl Iterator<Item = usize> + use<> {
        let count = self.batch_sizes.of_step(step) / self.micro_batch_size as usize;
        (d..count).step_by(dp)
    }
}

#[cfg(test)]
mod tests {
    use super::super::RampUp;
    use super::*;

    fn single(seed: u64, samples: u64) -> Order {
        Order::Single { seed, samples }
    }

    fn sampler(order: Order, global_batch_size: usize, micro_batch_size: usize) -> Sampler {
        Sampler::new(order, BatchSizes::new(global_batch_size, None).unwrap(), micro_batch_size)
    }

    /// One dataset, and several of which one is small.
    fn orders() -> [Order; 2] {
        [single(1, 1000), Order::Blend(Blend::new(1, &[0.2, 0.5, 0.3], &[7, 300, 1000]).unwrap())]
    }

    /// The samples of steps 1..=steps, in micro-batch order, as `dp` ranks see them.
    fn run(sampler: &Sampler, steps: Range<u64>, dp: usize) -> Vec<Place> {
        let mut samples = Vec::new();
        for step in steps {
            let mut by_micro_batch = Vec::new();
            for d in 0..dp {
                by_micro_batch
                    .extend(sampler.of_rank(step, d, dp).map(|u| (u, sampler.micro_batch(step, u))));
            }
            by_micro_batch.sort_by_key(|(u, _)| *u);
            samples.extend(by_micro_batch.into_iter().flat_map(|(_, samples)| samples));
        }
        samples
    }

    #[test]
    fn an_epoch_has_every_sample_once_and_batches_straddle_epochs() {
        let sampler = sampler(single(9, 17), 12, 3);
        let samples: Vec<u64> = run(&sampler, 1..18, 1).iter().map(|place| place.sample).collect();
        assert_eq!(samples.len(), 17 * 12);
        let epochs: Vec<&[u64]> = samples.chunks(17).collect();
        for epoch in &epochs {
            let mut sorted = epoch.to_vec();
            sorted.sort();
            assert_eq!(sorted, (0..17).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
    }

    #[test]
    fn data_parallelism_and_resuming_do_not_change_the_samples() {
        for order in orders() {
            let sampler = sampler(order, 24, 2);
            let whole = run(&sampler, 1..10, 1);
            for dp in [2, 3, 4, 6, 12] {
                assert_eq!(run(&sampler, 1..10, dp), whole, "dp {dp}");
            }
            assert_eq!(run(&sampler, 6..10, 4), whole[5 * 24..]);
            assert_eq!(sampler.cursor(6), 5 * 24);
        }
    }

    /// The same samples in the same order, dealt to steps of other sizes.
    #[test]
    fn a_ramp_up_changes_no_order() {
        let ramp_up = RampUp { start: 4, increment: 4, samples: 50 };
        for order in orders() {
            let ramped = Sampler::new(order.clone(), BatchSizes::new(24, Some(ramp_up)).unwrap(), 2);
            let whole = run(&sampler(order, 24, 2), 1..10, 1);
            for dp in [1, 2] {
                let samples = run(&ramped, 1..12, dp);
                assert_eq!(samples.len() as u64, ramped.cursor(12));
                assert_eq!(samples, whole[..samples.len()], "dp {dp}");
            }
        }
    }

    #[test]
    fn ranks_interleave() {
        let sampler = sampler(single(1, 1000), 12, 2);
        assert_eq!(sampler.of_rank(3, 1, 3).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(sampler.indices(3, 4), 32..34);
    }
}
