//! From logits to a token.

use super::InferError;

/// How a token is chosen: temperature, then [`top_k`](Self::top_k), then [`top_p`](Self::top_p), as transformers does. What
/// they leave is drawn from in proportion to its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token, of several the smallest, whatever else is set.
    pub temperature: f64,
    /// The likeliest so many tokens are left, of equally likely ones the smallest; all unless given.
    pub top_k: Option<usize>,
    /// The fewest tokens are left, the likeliest first, whose probabilities sum to at least this (nucleus sampling, arXiv
    /// 1904.09751); one at least, all if it is 1.
    pub top_p: f64,
    /// Seed of the choices.
    pub seed: u64,
}

impl Default for Sampling {
    /// From all tokens as they are likely.
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: None, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// Refuses what is out of range.
    ///
    /// # Errors
    /// [`InferError::Setting`].
    pub fn check(&self) -> Result<(), InferError> {
        let Sampling { temperature, top_k, top_p, .. } = *self;
        let refuse = |name, value: String, allowed| Err(InferError::Setting { name, value, allowed });
        if !(0.0..=f64::MAX).contains(&temperature) {
            return refuse("temperature", temperature.to_string(), "finite and at least 0");
        }
        if top_k == Some(0) {
            return refuse("top_k", "0".to_owned(), "at least 1");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refuse("top_p", top_p.to_string(), "above 0 and at most 1");
        }
        Ok(())
    }

    /// The `n`-th choice, of a token of the vocabulary that `logits` are of; none if the largest of them is not finite, or
    /// one is no number. It depends on the logits, the settings and `n` alone.
    pub fn choose(&self, logits: &[f64], n: u64) -> Option<u32> {
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]))?;
        if !logits[best].is_finite() || logits.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        if self.temperature == 0.0 {
            return Some(best as u32);
        }
        let weight = |logit: &f64| ((logit - logits[best]) / self.temperature).exp();
        let mut weights: Vec<f64> = logits.iter().map(weight).collect();
        self.truncate(&mut weights);
        let mut left = uniform(self.seed, n) * weights.iter().sum::<f64>();
        for (token, weight) in weights.iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return Some(token as u32);
            }
        }
        // Rounding left something over.
        Some(best as u32)
    }

    /// Makes the weights of tokens 0 that are not left.
    fn truncate(&self, weights: &mut [f64]) {
        let top_k = self.top_k.unwrap_or(weights.len());
        if top_k >= weights.len() && self.top_p >= 1.0 {
            return;
        }
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let likeliest = &order[..top_k.min(order.len())];
        let mut missing = self.top_p * likeliest.iter().map(|&token| weights[token]).sum::<f64>();
        let mut kept = 0;
        for &token in likeliest {
            kept += 1;
            missing -= weights[token];
            if self.top_p < 1.0 && missing <= 0.0 {
                break;
            }
        }
        order[kept..].iter().for_each(|&token| weights[token] = 0.0);
    }
}

/// The `n`-th number of a seed, uniform in [0, 1).
fn uniform(seed: u64, n: u64) -> f64 {
    let hash = blake3::Hasher::new().update(&seed.to_le_bytes()).update(&n.to_le_bytes()).finalize();
    let mut bits = [0; 8];
    bits.copy_from_slice(&hash.as_bytes()[..8]);
    (u64::from_le_bytes(bits) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Holds frequencies to probabilities that sum to 1, within five standard errors; what has none never comes.
    #[track_caller]
    fn assert_frequencies(sampling: Sampling, logits: &[f64], probabilities: &[f64]) {
        let draws = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for n in 0..draws {
            counts[sampling.choose(logits, n).unwrap() as usize] += 1;
        }
        assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for (token, (&count, &p)) in counts.iter().zip(probabilities).enumerate() {
            let frequency = f64::from(count) / draws as f64;
            let error = 5.0 * (p * (1.0 - p) / draws as f64).sqrt();
            assert!((frequency - p).abs() <= error, "token {token}: {frequency} is not {p}, {sampling:?}");
        }
    }

    fn ln(probabilities: &[f64]) -> Vec<f64> {
        probabilities.iter().map(|p| p.ln() - 3.0).collect()
    }

    #[test]
    fn all_tokens_as_they_are_likely() {
        let plain = Sampling { seed: 3, ..Sampling::default() };
        assert_frequencies(plain, &ln(&[0.25, 0.75, 0.0]), &[0.25, 0.75, 0.0]);
        // Twice the temperature, the root of the ratios.
        assert_frequencies(Sampling { temperature: 2.0, ..plain }, &ln(&[0.1, 0.9]), &[0.25, 0.75]);
        assert_frequencies(Sampling { temperature: 0.5, ..plain }, &ln(&[0.25, 0.75]), &[0.1, 0.9]);
    }

    #[test]
    fn a_nucleus_is_the_fewest_tokens_that_suffice() {
        let logits = ln(&[0.1, 0.4, 0.05, 0.3, 0.15]);
        let nucleus = |top_p| Sampling { top_p, seed: 4, ..Sampling::default() };
        assert_frequencies(nucleus(1.0), &logits, &[0.1, 0.4, 0.05, 0.3, 0.15]);
        assert_frequencies(nucleus(0.9), &logits, &[2.0 / 19.0, 8.0 / 19.0, 0.0, 6.0 / 19.0, 3.0 / 19.0]);
        // 0.7 is just short of what the first two have.
        assert_frequencies(nucleus(0.699), &logits, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        assert_frequencies(nucleus(0.701), &logits, &[0.0, 8.0 / 17.0, 0.0, 6.0 / 17.0, 3.0 / 17.0]);
        for least in [0.39, 1e-12, f64::MIN_POSITIVE] {
            assert_frequencies(nucleus(least), &logits, &[0.0, 1.0, 0.0, 0.0, 0.0]);
        }
        // The temperature comes first: 0.8, 0.2 become 2/3, 1/3.
        let hot = Sampling { temperature: 2.0, ..nucleus(0.75) };
        assert_frequencies(hot, &ln(&[0.2, 0.8]), &[1.0 / 3.0, 2.0 / 3.0]);
    }

    #[test]
    fn of_equally_likely_tokens_the_smallest_are_left() {
        let logits = [1.0, 2.0, 2.0, 2.0, 1.0, 2.0];
        let halves = [0.0, 0.5, 0.5, 0.0, 0.0, 0.0];
        assert_frequencies(Sampling { top_k: Some(2), ..Sampling::default() }, &logits, &halves);
        // Each of the four has less than a quarter.
        assert_frequencies(Sampling { top_p: 0.4, ..Sampling::default() }, &logits, &halves);
        assert_eq!(Sampling::greedy().choose(&logits, 9), Some(1));
    }

    #[test]
    fn a_nucleus_is_of_the_likeliest_that_top_k_leaves() {
        let logits = ln(&[0.1, 0.4, 0.05, 0.3, 0.15]);
        let top = |top_k, top_p| Sampling { top_k: Some(top_k), top_p, seed: 5, ..Sampling::default() };
        assert_frequencies(top(3, 1.0), &logits, &[0.0, 8.0 / 17.0, 0.0, 6.0 / 17.0, 3.0 / 17.0]);
        // 0.7 of all, 0.82 of these three.
        assert_frequencies(top(3, 0.8), &logits, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.0]);
        assert_frequencies(top(9, 1.0), &logits, &[0.1, 0.4, 0.05, 0.3, 0.15]);
        assert_frequencies(top(1, 1.0), &logits, &[0.0, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_seed_and_the_number_of_the_choice_decide() {
        let logits = [0.0; 50];
        let choices =
            |seed| (0..40).map(move |n| Sampling { seed, ..Sampling::default() }.choose(&logits, n));
        assert!(choices(1).eq(choices(1)));
        assert!(!choices(1).eq(choices(2)));
    }

    #[test]
    fn what_is_no_distribution_has_no_choice() {
        for logits in [&[][..], &[f64::NAN, 1.0], &[f64::INFINITY, 1.0], &[f64::NEG_INFINITY; 2]] {
            assert_eq!(Sampling::default().choose(logits, 0), None, "{logits:?}");
            assert_eq!(Sampling::greedy().choose(logits, 0), None, "{logits:?}");
        }
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let plain = Sampling::default();
        plain.check().unwrap();
        Sampling::greedy().check().unwrap();
        for (sampling, name) in [
            (Sampling { temperature: -1.0, ..plain }, "temperature = -1"),
            (Sampling { temperature: f64::NAN, ..plain }, "temperature = NaN"),
            (Sampling { temperature: f64::INFINITY, ..plain }, "temperature = inf"),
            (Sampling { top_k: Some(0), ..plain }, "top_k = 0"),
            (Sampling { top_p: 0.0, ..plain }, "top_p = 0"),
            (Sampling { top_p: 1.5, ..plain }, "top_p = 1.5"),
            (Sampling { top_p: f64::NAN, ..plain }, "top_p = NaN"),
        ] {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
