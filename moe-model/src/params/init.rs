//! Initial weights that depend on the seed, the name and the position of an element, and on nothing else.
//!
//! Element `n` of a tensor (row-major, unsharded) is drawn from a counter-based generator, so every rank makes its
//! own block of the same tensor under any mapping.

use moe_kernels::random::philox4x32_10;

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All ones: norm weights.
    Ones,
    /// All zeros: biases.
    Zeros,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
}

/// The stream of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
    init: Init,
}

impl Stream {
    /// The stream of the tensor `name` under `seed`: its key is the first 64 bits of BLAKE3(seed ‖ name), the seed as
    /// eight little-endian bytes.
    pub fn new(seed: u64, name: &str, init: Init) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
        let hash = hasher.finalize();
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&hash.as_bytes()[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        Stream { key: [word(0), word(4)], init }
    }

    /// Element `n`.
    pub fn element(&self, n: u64) -> f64 {
        match self.init {
            Init::Ones => 1.0,
            Init::Zeros => 0.0,
            Init::Normal(std) => std * self.normal(n),
        }
    }

    /// Standard normal by Box and Muller: the counter `n >> 1` gives a pair, cosine for even `n`, sine for odd.
    fn normal(&self, n: u64) -> f64 {
        let pair = n >> 1;
        let [a, b, c, d] = philox4x32_10([pair as u32, (pair >> 32) as u32, 0, 0], self.key);
        let bits = |low: u32, high: u32| (((high as u64) << 32 | low as u64) >> 11) as f64;
        const ULP: f64 = 1.0 / (1u64 << 53) as f64;
        let radius = libm::sqrt(-2.0 * libm::log((bits(a, b) + 1.0) * ULP));
        let angle = 2.0 * std::f64::consts::PI * (bits(c, d) * ULP);
        radius * if n & 1 == 0 { libm::cos(angle) } else { libm::sin(angle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_independence_of_names() {
        let n = 100_000;
        let a = Stream::new(7, "a", Init::Normal(1.0));
        let b = Stream::new(7, "b", Init::Normal(1.0));
        let (mut mean, mut var, mut cross, mut fourth) = (0.0, 0.0, 0.0, 0.0);
        for i in 0..n {
            let x = a.element(i);
            mean += x / n as f64;
            var += x * x / n as f64;
            fourth += x.powi(4) / n as f64;
            cross += x * b.element(i) / n as f64;
        }
        // five standard errors each
        assert!(mean.abs() < 5.0 / (n as f64).sqrt(), "{mean}");
        assert!((var - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "{var}");
        assert!((fourth - 3.0).abs() < 5.0 * (96.0 / n as f64).sqrt(), "{fourth}");
        assert!(cross.abs() < 5.0 / (n as f64).sqrt(), "{cross}");
        assert_ne!(a.element(3), Stream::new(8, "a", Init::Normal(1.0)).element(3));
    }
}
