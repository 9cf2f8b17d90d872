//! Which samples make up which micro-batch of which step.

use std::ops::Range;

use super::{BatchSizes, Permutation};

/// The order of samples, by a global index `g` from 0 that is all the state there is.
///
/// Index `g` is sample `π(seed, q)(g mod n)` of epoch `q = ⌊g/n⌋`. Step `t` (from 1) uses the next `G_t` indices; its
/// micro-batch `u` the sequences `ub … ub+b−1` of these. Data-parallel rank `d` of DP runs `u = j·DP + d`, `j` ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sampler {
    seed: u64,
    samples: u64,
    batch_sizes: BatchSizes,
    micro_batch_size: u64,
}

impl Sampler {
    /// For `samples` samples per epoch and b `micro_batch_size`, a divisor of every batch size. None is 0.
    pub fn new(seed: u64, samples: u64, batch_sizes: BatchSizes, micro_batch_size: usize) -> Self {
        Sampler { seed, samples, batch_sizes, micro_batch_size: micro_batch_size as u64 }
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

    /// The sample at a global index.
    pub fn sample(&self, g: u64) -> u64 {
        Permutation::new(self.seed, g / self.samples, self.samples).at(g % self.samples)
    }

    /// The samples of micro-batch `u` of a step.
    pub fn micro_batch(&self, step: u64, u: usize) -> impl Iterator<Item = u64> {
        self.indices(step, u).map(|g| self.sample(g))
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

    fn sampler(seed: u64, samples: u64, global_batch_size: usize, micro_batch_size: usize) -> Sampler {
        Sampler::new(seed, samples, BatchSizes::new(global_batch_size, None).unwrap(), micro_batch_size)
    }

    /// The samples of steps 1..=steps, in micro-batch order, as `dp` ranks see them.
    fn run(sampler: &Sampler, steps: Range<u64>, dp: usize) -> Vec<u64> {
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
        let sampler = sampler(9, 17, 12, 3);
        let samples = run(&sampler, 1..18, 1);
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
        let sampler = sampler(1, 1000, 24, 2);
        let whole = run(&sampler, 1..10, 1);
        for dp in [2, 3, 4, 6, 12] {
            assert_eq!(run(&sampler, 1..10, dp), whole, "dp {dp}");
        }
        assert_eq!(run(&sampler, 6..10, 4), whole[5 * 24..]);
        assert_eq!(sampler.cursor(6), 5 * 24);
    }

    /// The same samples in the same order, dealt to steps of other sizes.
    #[test]
    fn a_ramp_up_changes_no_order() {
        let ramp_up = RampUp { start: 4, increment: 4, samples: 50 };
        let ramped = Sampler::new(1, 1000, BatchSizes::new(24, Some(ramp_up)).unwrap(), 2);
        let whole = run(&sampler(1, 1000, 24, 2), 1..10, 1);
        for dp in [1, 2] {
            let samples = run(&ramped, 1..12, dp);
            assert_eq!(samples.len() as u64, ramped.cursor(12));
            assert_eq!(samples, whole[..samples.len()], "dp {dp}");
        }
    }

    #[test]
    fn ranks_interleave() {
        let sampler = sampler(1, 1000, 12, 2);
        assert_eq!(sampler.of_rank(3, 1, 3).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(sampler.indices(3, 4), 32..34);
    }
}
