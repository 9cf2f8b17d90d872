//! A random order of `0..n` in constant memory.

/// A keyed permutation of `0..n`: a balanced Feistel network on the smallest even number of bits that holds `n − 1`,
/// applied again while the result is not below `n` (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite
/// Domains", 2002). Fewer than four applications are expected. The order is part of the data's definition: it never
/// changes.
///
/// ```
/// use moe_train::data::Permutation;
///
/// let epoch = Permutation::new(42, 0, 10);
/// let mut seen: Vec<u64> = (0..10).map(|i| epoch.at(i)).collect();
/// seen.sort();
/// assert_eq!(seen, (0..10).collect::<Vec<_>>());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

const ROUNDS: usize = 8;

impl Permutation {
    /// The permutation `π(seed, stream)` of `0..n`; streams are epochs or cycles.
    pub fn new(seed: u64, stream: u64, n: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut bytes = [0; 8 * ROUNDS];
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"moe-train permutation").update(&seed.to_le_bytes()).update(&stream.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        let mut keys = [0; ROUNDS];
        for (key, bytes) in keys.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *key = u64::from_le_bytes(*bytes);
        }
        Permutation { n, half_bits: bits.div_ceil(2), keys }
    }

    /// Where `i` goes. `i` is below `n`.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n, "{i} of {}", self.n);
        let mut x = self.network(i);
        while x >= self.n {
            x = self.network(x);
        }
        x
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_bijection(permutation: Permutation, n: u64) -> bool {
        let mut seen = vec![false; n as usize];
        (0..n).all(|i| !std::mem::replace(&mut seen[permutation.at(i) as usize], true))
    }

    #[test]
    fn small_domains() {
        for n in 1..=300 {
            assert!(is_bijection(Permutation::new(3, n, n), n), "{n}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_number_once(seed: u64, stream: u64, n in 1_u64..20_000) {
            prop_assert!(is_bijection(Permutation::new(seed, stream, n), n));
        }

        #[test]
        fn large_domains_stay_inside(seed: u64, n in 1_u64.., i: u64) {
            prop_assert!(Permutation::new(seed, 0, n).at(i % n) < n);
        }
    }

    /// Every first element is about equally often everywhere: chi-squared over seeds, 9 degrees of freedom, p = 1e-6.
    #[test]
    fn positions_are_uniform() {
        let (n, draws) = (10, 5_000);
        for i in [0, 4, 9] {
            let mut counts = [0_f64; 10];
            for seed in 0..draws {
                counts[Permutation::new(seed, 5, n).at(i) as usize] += 1.0;
            }
            let expected = draws as f64 / n as f64;
            let chi_squared: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
            assert!(chi_squared < 45.1, "{i}: {chi_squared}");
        }
    }

    /// Neighbours do not stay neighbours: the serial correlation of a random order vanishes like 1/√n.
    #[test]
    fn neighbours_are_torn_apart() {
        let n = 10_007;
        let order: Vec<f64> = {
            let permutation = Permutation::new(11, 0, n);
            (0..n).map(|i| permutation.at(i) as f64 / n as f64 - 0.5).collect()
        };
        let correlation = order.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64 * 12.0;
        assert!(correlation.abs() < 5.0 / (n as f64).sqrt(), "{correlation}");
    }

    #[test]
    fn seed_and_stream_matter_and_the_order_is_fixed() {
        let order =
            |seed, stream| (0..8).map(|i| Permutation::new(seed, stream, 1000).at(i)).collect::<Vec<_>>();
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        // Runs made with an older version must resume on the same samples.
        assert_eq!(order(1, 0), [473, 566, 952, 687, 888, 648, 826, 653]);
    }
}
