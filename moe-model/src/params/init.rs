//! Initial weights that depend on the seed, the name and the position of an element, and on nothing else.
//!
//! Element `n` of a tensor (row-major, unsharded) is drawn from a counter-based generator, so every rank makes its
//! own block of the same tensor under any mapping.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

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

    /// The elements from `n` on, as many as `out` takes.
    pub fn fill(&self, n: u64, out: &mut [f64]) {
        let Init::Normal(std) = self.init else { return out.fill(self.element(n)) };
        let (odd, pairs) = out.split_at_mut((n as usize % 2).min(out.len()));
        odd.fill(self.element(n));
        for (pair, out) in (n.div_ceil(2)..).zip(pairs.chunks_mut(2)) {
            for (out, normal) in out.iter_mut().zip(self.pair(pair)) {
                *out = std * normal;
            }
        }
    }

    /// Standard normal.
    fn normal(&self, n: u64) -> f64 {
        self.pair(n >> 1)[n as usize & 1]
    }

    /// Two standard normals by Box and Muller, of the counter `pair`: the cosine is element `2·pair`, the sine the next.
    fn pair(&self, pair: u64) -> [f64; 2] {
        let [a, b, c, d] = philox4x32_10([pair as u32, (pair >> 32) as u32, 0, 0], self.key);
        let bits = |low: u32, high: u32| (((high as u64) << 32 | low as u64) >> 11) as f64;
        const ULP: f64 = 1.0 / (1u64 << 53) as f64;
        let radius = libm::sqrt(-2.0 * libm::log((bits(a, b) + 1.0) * ULP));
        let angle = 2.0 * std::f64::consts::PI * (bits(c, d) * ULP);
        [radius * libm::cos(angle), radius * libm::sin(angle)]
    }
}

/// Gives `put` what each of `runs` makes, with where it belongs, in no order. Where there are several, all cores make them.
pub(super) fn on_all_cores<V, F, E>(
    runs: &[(usize, F)],
    mut put: impl FnMut(usize, &[V]) -> Result<(), E>,
) -> Result<(), E>
where
    V: Send,
    F: Fn() -> Vec<V> + Sync,
{
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(runs.len());
    if cores < 2 {
        return runs.iter().try_for_each(|(at, run)| put(*at, &run()));
    }
    let next = AtomicUsize::new(0);
    let (done, made) = mpsc::sync_channel(cores);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            let (next, done) = (&next, done.clone());
            scope.spawn(move || {
                while let Some((at, run)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Nobody receives any more after an error of `put`.
                    if done.send((*at, run())).is_err() {
                        break;
                    }
                }
            });
        }
        drop(done);
        // Consumed here, so that an error ends the threads.
        made.into_iter().try_for_each(|(at, values)| put(at, &values))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_elements_are_the_elements() {
        for init in [Init::Ones, Init::Zeros, Init::Normal(0.5)] {
            let stream = Stream::new(3, "a", init);
            for (first, len) in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 6), (0, 7), (5, 6), (5, 7), (1 << 40, 9)]
            {
                let mut run = vec![f64::NAN; len];
                stream.fill(first, &mut run);
                let bits = |x: f64| x.to_bits();
                let elements = (first..first + len as u64).map(|n| bits(stream.element(n)));
                assert!(run.into_iter().map(bits).eq(elements), "{init:?}: {len} from {first}");
            }
        }
    }

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
