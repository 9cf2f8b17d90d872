//! Choices of experts that ignore the scores, to measure what a load costs.

use moe_kernels::random::uniform_pair;

use crate::tokens::TokenIds;

/// A load that training is given, whatever routers would choose; weights are still made of their scores, and gradients go
/// through them. Evaluation is never forced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ForcedRouting {
    /// All experts get equally many tokens: slot `k` of token `j` of the step's `G·S` goes to expert `(jK + k) mod E`.
    Balanced,
    /// Expert `e` is as popular as `1 / (e + 1)^exponent` (Zipf's law), so that the first experts, and the ranks that hold
    /// them, get most: a token's experts are drawn one after the other, without putting back.
    Skewed {
        /// 0 draws all alike.
        exponent: f64,
    },
}

impl ForcedRouting {
    /// `top_k` experts of `num_experts` for each token, in row order. `batch` is the number of sequences of the step, `key`
    /// that of its random numbers.
    pub fn choose(
        self,
        tokens: &TokenIds,
        batch: usize,
        num_experts: usize,
        top_k: usize,
        key: u64,
    ) -> Vec<i32> {
        match self {
            ForcedRouting::Balanced => {
                let (len, batch) = (tokens.seq_len as u64, batch.max(1) as u64);
                let first = |t: &crate::tokens::TokenId| (t.sequence % batch) * len + t.position as u64;
                let of_token = |j: u64| {
                    (0..top_k as u64).map(move |k| ((j * top_k as u64 + k) % num_experts as u64) as i32)
                };
                tokens.tokens.iter().map(first).flat_map(of_token).collect()
            }
            ForcedRouting::Skewed { exponent } => {
                tokens.numbers().flat_map(|token| drawn(exponent, num_experts, top_k, key, token)).collect()
            }
        }
    }
}

/// The `top_k` largest of `−exponent·ln(e + 1)` with Gumbel noise are a draw without putting back (Kool, van Hoof, Welling,
/// arXiv 1903.06059).
fn drawn(exponent: f64, num_experts: usize, top_k: usize, key: u64, token: u64) -> Vec<i32> {
    let mut keys: Vec<(f64, i32)> = (0..num_experts)
        .map(|e| {
            let u = uniform_pair(key, token, e as u64 / 2)[e % 2];
            (-exponent * libm::log(e as f64 + 1.0) - libm::log(-libm::log(u)), e as i32)
        })
        .collect();
    keys.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    keys.into_iter().take(top_k).map(|(_, e)| e).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::TokenId;

    fn tokens(sequences: std::ops::Range<u64>, seq_len: usize) -> TokenIds {
        let of_sequence = |sequence| (0..seq_len).map(move |position| TokenId { sequence, position });
        TokenIds { tokens: sequences.flat_map(of_sequence).collect(), seq_len }
    }

    fn counts(chosen: &[i32], num_experts: usize, top_k: usize) -> Vec<usize> {
        for experts in chosen.chunks(top_k) {
            assert!(experts.iter().enumerate().all(|(n, e)| !experts[..n].contains(e)), "{experts:?}");
        }
        (0..num_experts as i32).map(|e| chosen.iter().filter(|&&c| c == e).count()).collect()
    }

    #[test]
    fn a_balanced_load_is_even_over_a_step_wherever_it_starts() {
        for (experts, top_k) in [(8, 2), (6, 4), (5, 5), (12, 1)] {
            // Steps of 6 sequences of 10 tokens.
            for first in [0, 6, 6000] {
                let chosen =
                    ForcedRouting::Balanced.choose(&tokens(first..first + 6, 10), 6, experts, top_k, 0);
                assert_eq!(chosen[..top_k], (0..top_k as i32).collect::<Vec<_>>());
                let counts = counts(&chosen, experts, top_k);
                assert!(counts.iter().all(|&c| c == 60 * top_k / experts), "{counts:?}");
            }
        }
    }

    #[test]
    fn a_skewed_load_follows_zipf() {
        let (experts, n) = (8, 20_000);
        let skewed = |exponent, top_k| {
            let chosen =
                ForcedRouting::Skewed { exponent }.choose(&tokens(0..n / 100, 100), 16, experts, top_k, 9);
            counts(&chosen, experts, top_k)
        };
        let exponent = 1.2;
        let share = |e: usize| ((e + 1) as f64).powf(-exponent);
        let all: f64 = (0..experts).map(share).sum();
        for (e, count) in skewed(exponent, 1).into_iter().enumerate() {
            let p = share(e) / all;
            // five standard errors
            let error = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
            assert!((count as f64 - n as f64 * p).abs() < error, "expert {e}: {count} of {n}, {p}");
        }
        // The second draw is from what is left: P(0 in two) = p0 + Σ_e p_e·p0/(1 − p_e).
        let p = |e| share(e) / all;
        let both = p(0) + (1..experts).map(|e| p(e) * p(0) / (1.0 - p(e))).sum::<f64>();
        let error = 5.0 * (n as f64 * both * (1.0 - both)).sqrt();
        assert!((skewed(exponent, 2)[0] as f64 - n as f64 * both).abs() < error);
        let error = 5.0 * (n as f64 * (1.0 / 8.0) * (7.0 / 8.0)).sqrt();
        assert!(skewed(0.0, 1).into_iter().all(|count| (count as f64 - n as f64 / 8.0).abs() < error));
    }
}
