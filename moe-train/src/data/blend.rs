//! Datasets in proportions.

use super::Permutation;

/// Slots of a cycle, in which every dataset has its share.
pub const CYCLE: u64 = 10_000;

/// Why weights were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BlendError {
    /// A weight that is none.
    #[error("weight {index} is {weight}, but it must be finite and above 0")]
    Weight {
        /// Which one, from 1.
        index: usize,
        /// The weight.
        weight: f64,
    },
    /// A weight that is so small that nothing of the dataset would be used.
    #[error(
        "weight {index} is {weight}, which of {sum} in all is not one sample in {CYCLE}: raise it or remove the dataset"
    )]
    Small {
        /// Which one, from 1.
        index: usize,
        /// The weight.
        weight: f64,
        /// The sum of all.
        sum: f64,
    },
}

/// A sample of one of several datasets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which dataset, from 0.
    pub dataset: usize,
    /// Which of its samples, from 0.
    pub sample: u64,
}

/// The order of samples of several datasets in proportions, in constant memory: global index `g` has slot `s = π(seed,
/// c)(g mod Q)` of cycle `c = ⌊g/Q⌋` of Q = [`CYCLE`]. Each dataset has an interval of slots as long as its quota, in the order
/// in which they are given; that which has `s`, from `start` on, gives its `i`-th sample, `i = c·quota + (s − start)`, in
/// an order with epochs of its own: of n samples, `π(seed', ⌊i/n⌋)(i mod n)`.
///
/// So every dataset has its share of every Q samples exactly, and of fewer at random.
///
/// ```
/// use moe_train::data::{Blend, CYCLE};
///
/// // Three quarters of a dataset of 40 samples and a quarter of one of 1000.
/// let blend = Blend::new(42, &[3.0, 1.0], &[40, 1000])?;
/// assert_eq!(blend.counts(CYCLE), [7500, 2500]);
/// let of_the_first = (0..100).filter(|&g| blend.at(g).dataset == 0).count();
/// assert!((60..90).contains(&of_the_first));
/// # Ok::<(), moe_train::data::BlendError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blend {
    seed: u64,
    parts: Vec<Part>,
}

/// What a dataset has of a cycle.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// The first slot.
    start: u64,
    quota: u64,
    /// Seed of the order of its samples.
    seed: u64,
    samples: u64,
}

impl Blend {
    /// For as many datasets as there are weights, at least one, with numbers of samples that are not 0. Weights need not sum
    /// to 1.
    ///
    /// # Errors
    /// As [`quotas`].
    pub fn new(seed: u64, weights: &[f64], samples: &[u64]) -> Result<Self, BlendError> {
        let mut start = 0;
        let part = |((dataset, quota), &samples): ((u64, u64), &u64)| {
            let part = Part { start, quota, seed: seed_of(seed, dataset), samples };
            start += quota;
            part
        };
        let parts = (0..).zip(quotas(weights)?).zip(samples).map(part).collect();
        Ok(Blend { seed, parts })
    }

    /// The sample at a global index.
    pub fn at(&self, g: u64) -> Place {
        let cycle = g / CYCLE;
        let slot = Permutation::new(self.seed, cycle, CYCLE).at(g % CYCLE);
        let dataset = self.of_slot(slot);
        let Part { start, quota, seed, samples } = self.parts[dataset];
        let i = cycle * quota + (slot - start);
        Place { dataset, sample: Permutation::new(seed, i / samples, samples).at(i % samples) }
    }

    /// How many of the samples before global index `g` are of each dataset.
    pub fn counts(&self, g: u64) -> Vec<u64> {
        let mut counts: Vec<u64> = self.parts.iter().map(|part| g / CYCLE * part.quota).collect();
        let cycle = Permutation::new(self.seed, g / CYCLE, CYCLE);
        for i in 0..g % CYCLE {
            counts[self.of_slot(cycle.at(i))] += 1;
        }
        counts
    }

    /// The dataset in whose interval a slot is.
    fn of_slot(&self, slot: u64) -> usize {
        // The first interval starts at 0.
        self.parts.partition_point(|part| part.start <= slot) - 1
    }
}

/// Of the [`CYCLE`] slots, those of each weight: in proportion, rounded down, and one more for the largest remainders (ties: the
/// earlier one) until all are given.
///
/// # Errors
/// A weight is not finite and positive, or its quota is 0.
pub fn quotas(weights: &[f64]) -> Result<Vec<u64>, BlendError> {
    let wrong = (1..).zip(weights).find(|&(_, &weight)| !(weight > 0.0 && weight.is_finite()));
    if let Some((index, &weight)) = wrong {
        return Err(BlendError::Weight { index, weight });
    }
    // Divided by the largest, so that no sum is infinite.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let sum: f64 = weights.iter().map(|weight| weight / largest).sum();
    let exact: Vec<f64> = weights.iter().map(|weight| weight / largest / sum * CYCLE as f64).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|&share| share as u64).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = CYCLE.saturating_sub(quotas.iter().sum());
    for &dataset in by_remainder.iter().cycle().take(left as usize) {
        quotas[dataset] += 1;
    }
    match quotas.iter().position(|&quota| quota == 0) {
        Some(i) => Err(BlendError::Small { index: i + 1, weight: weights[i], sum: weights.iter().sum() }),
        None => Ok(quotas),
    }
}

/// The seed of the order of a dataset's samples: another than that of cycles and of the other datasets.
fn seed_of(seed: u64, dataset: u64) -> u64 {
    let mut bytes = [0; 8];
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"moe-train blend").update(&seed.to_le_bytes()).update(&dataset.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quotas_are_those_of_the_largest_remainders() {
        for (weights, wanted) in [
            (&[1.0][..], &[10_000][..]),
            (&[0.7, 0.3], &[7000, 3000]),
            // 3333.33 each: the one that is left goes to the first.
            (&[1.0, 1.0, 1.0], &[3334, 3333, 3333]),
            // 1428.57, 2857.14, 5714.29: to the first.
            (&[1.0, 2.0, 4.0], &[1429, 2857, 5714]),
            // 0.6 of a slot is one, since its remainder is the largest.
            (&[6e-5, 1.0], &[1, 9999]),
            (&[f64::MAX, f64::MAX], &[5000, 5000]),
        ] {
            assert_eq!(quotas(weights).unwrap(), wanted, "{weights:?}");
        }
    }

    #[test]
    fn weights_without_a_sample_are_refused() {
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = quotas(&[1.0, weight]).unwrap_err().to_string();
            assert_eq!(error, format!("weight 2 is {weight}, but it must be finite and above 0"));
        }
        let error = quotas(&[1e-5, 2.0]).unwrap_err().to_string();
        assert_eq!(
            error,
            "weight 1 is 0.00001, which of 2.00001 in all is not one sample in 10000: raise it or remove the dataset"
        );
    }

    /// The definition, followed slot by slot with maps in place of arithmetic.
    #[test]
    fn the_order_is_the_one_defined() {
        let (seed, weights, samples) = (7, [1.0, 2.0, 4.0], [100, 5000, 1_000_000]);
        let blend = Blend::new(seed, &weights, &samples).unwrap();
        let mut owner = Vec::new();
        for (dataset, quota) in [1429, 2857, 5714].into_iter().enumerate() {
            owner.extend((0..quota).map(|offset| (dataset, offset)));
        }
        let quotas = [1429, 2857, 5714];
        for g in (0..3 * CYCLE).step_by(7) {
            let (cycle, place) = (g / CYCLE, blend.at(g));
            let slot = Permutation::new(seed, cycle, CYCLE).at(g % CYCLE);
            let (dataset, offset) = owner[slot as usize];
            let (i, n) = (cycle * quotas[dataset] + offset, samples[dataset]);
            let sample = Permutation::new(seed_of(seed, dataset as u64), i / n, n).at(i % n);
            assert_eq!(place, Place { dataset, sample });
        }
        // Runs made with an older version must resume on the same samples.
        let first: Vec<(usize, u64)> =
            (0..6).map(|g| blend.at(g)).map(|Place { dataset, sample }| (dataset, sample)).collect();
        assert_eq!(first, [(2, 964_251), (1, 4971), (1, 4276), (1, 1317), (2, 283_066), (1, 3715)]);
    }

    #[test]
    fn copies_of_a_dataset_have_orders_of_their_own() {
        let blend = Blend::new(1, &[1.0, 1.0], &[50, 50]).unwrap();
        let of = |dataset| {
            let places = (0..200).map(|g| blend.at(g)).filter(|place| place.dataset == dataset);
            places.map(|place| place.sample).take(40).collect::<Vec<_>>()
        };
        assert_ne!(of(0), of(1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// A cycle has each dataset's quota; while it lasts no sample of an epoch is used twice before all were.
        #[test]
        fn shares_and_epochs_are_exact(
            seed: u64,
            datasets in prop::collection::vec((0.01_f64..1.0, 1_u64..30_000), 1..6),
        ) {
            let (weights, samples): (Vec<f64>, Vec<u64>) = datasets.into_iter().unzip();
            let blend = Blend::new(seed, &weights, &samples).unwrap();
            let quotas = quotas(&weights).unwrap();
            prop_assert_eq!(quotas.iter().sum::<u64>(), CYCLE);
            let sum: f64 = weights.iter().sum();
            for (&quota, weight) in quotas.iter().zip(&weights) {
                prop_assert!((quota as f64 - weight / sum * CYCLE as f64).abs() < 1.0);
            }
            let mut seen = HashMap::new();
            for g in 0..2 * CYCLE {
                *seen.entry(blend.at(g)).or_insert(0_u64) += 1;
            }
            for (dataset, (&quota, &n)) in quotas.iter().zip(&samples).enumerate() {
                let used = 2 * quota;
                let times: Vec<u64> = (0..n).map(|sample| seen.get(&Place { dataset, sample }).copied().unwrap_or(0)).collect();
                prop_assert_eq!(times.iter().sum::<u64>(), used);
                prop_assert!(times.iter().all(|&t| t == used / n || t == used.div_ceil(n)));
            }
        }

        #[test]
        fn counts_are_of_what_came_before(seed: u64, g in 0_u64..25_000) {
            let blend = Blend::new(seed, &[0.2, 0.5, 0.3], &[10, 1000, 10]).unwrap();
            let mut counts = [0; 3];
            for place in (0..g).map(|g| blend.at(g)) {
                counts[place.dataset] += 1;
            }
            prop_assert_eq!(blend.counts(g), counts);
        }

        #[test]
        fn huge_indices_have_places(g in 0_u64.., n in 1_u64..) {
            let blend = Blend::new(3, &[1.0, 1e-3], &[n, 1]).unwrap();
            let place = blend.at(g);
            prop_assert!(place.sample < [n, 1][place.dataset]);
        }
    }
}
