//! An MoE layer twice: on one rank in plain f64 loops, written from the formulas, and over a folded world of threads
//! with the crate under test.

pub mod reference;
pub mod world;

use moe_dispatch::capacity::DropPolicy;
use moe_kernels::family::ScoreFunction;

/// Sizes and settings of a layer and its data.
#[derive(Debug, Clone)]
pub struct Problem {
    pub hidden: usize,
    /// Feed-forward size of an expert.
    pub intermediate: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub score: ScoreFunction,
    pub aux_loss_coef: f64,
    pub z_loss_coef: f64,
    pub skew: Skew,
    pub seed: u64,
    /// The micro-batch of each token.
    pub units: Vec<usize>,
    pub num_units: usize,
    /// Factor and policy of dropping.
    pub capacity: Option<(f64, DropPolicy)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skew {
    None,
    /// Nobody chooses expert 1.
    Empty,
    /// Everybody's first choice is the last expert.
    ToOne,
}

/// What a layer computes, summed over all tokens: `y, dx: [N, H]`, `dgate_up: [E, 2I, H]`, `ddown: [E, H, I]`.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub y: Vec<f64>,
    pub dx: Vec<f64>,
    pub drouter: Vec<f64>,
    pub dgate_up: Vec<f64>,
    pub ddown: Vec<f64>,
    pub aux_loss: f64,
    pub z_loss: f64,
    pub expert_counts: Vec<i64>,
    pub dropped: u64,
}

/// Uniform in [−1, 1), a function of its arguments alone.
fn noise(seed: u64, stream: u64, index: usize) -> f64 {
    let mut z = seed
        ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ (index as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    for _ in 0..2 {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
    }
    (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

impl Problem {
    pub fn tokens(&self) -> usize {
        self.units.len()
    }

    /// The tokens of a unit, in the order that decides who is kept: not that in which ranks hold them.
    pub fn in_order(&self, unit: usize) -> Vec<usize> {
        let mut tokens: Vec<usize> = (0..self.tokens()).filter(|&i| self.units[i] == unit).collect();
        tokens.sort_by(|&a, &b| noise(self.seed, 6, a).total_cmp(&noise(self.seed, 6, b)));
        tokens
    }

    fn random(&self, stream: u64, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|i| scale * noise(self.seed, stream, i)).collect()
    }

    /// `[N, H]`; the first feature is 1, so that the router's first column is a bias.
    pub fn x(&self) -> Vec<f64> {
        let mut x = self.random(1, self.tokens() * self.hidden, 1.0);
        x.iter_mut().step_by(self.hidden).for_each(|x| *x = 1.0);
        x
    }

    /// The gradient of the objective by the layer's output, `[N, H]`.
    pub fn dy(&self) -> Vec<f64> {
        self.random(2, self.tokens() * self.hidden, 1.0)
    }

    /// `[E, H]`.
    pub fn router(&self) -> Vec<f64> {
        let mut w = self.random(3, self.num_experts * self.hidden, 1.0);
        match self.skew {
            Skew::None => {}
            Skew::Empty => w[self.hidden] -= 20.0,
            Skew::ToOne => w[(self.num_experts - 1) * self.hidden] += 20.0,
        }
        w
    }

    /// `[E, 2I, H]`, gate first.
    pub fn gate_up(&self) -> Vec<f64> {
        self.random(4, self.num_experts * 2 * self.intermediate * self.hidden, 0.7)
    }

    /// `[E, H, I]`.
    pub fn down(&self) -> Vec<f64> {
        self.random(5, self.num_experts * self.hidden * self.intermediate, 0.7)
    }
}

/// Panics unless `max |a − b| ≤ tolerance · max |b|`.
pub fn assert_close(name: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{name}: number of elements");
    let largest = b.iter().fold(1e-3, |m: f64, b| m.max(b.abs()));
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let difference = (a - b).abs();
        assert!(
            difference <= tolerance * largest,
            "{name}[{i}]: {a} where {b} is expected, of up to {largest}"
        );
    }
}

impl Outcome {
    pub fn assert_close(&self, expected: &Outcome, tolerance: f64) {
        assert_close("y", &self.y, &expected.y, tolerance);
        assert_close("dx", &self.dx, &expected.dx, tolerance);
        assert_close("drouter", &self.drouter, &expected.drouter, tolerance);
        assert_close("dgate_up", &self.dgate_up, &expected.dgate_up, tolerance);
        assert_close("ddown", &self.ddown, &expected.ddown, tolerance);
        assert_close("aux_loss", &[self.aux_loss], &[expected.aux_loss], tolerance);
        assert_close("z_loss", &[self.z_loss], &[expected.z_loss], tolerance);
        assert_eq!(self.expert_counts, expected.expert_counts);
        assert_eq!(self.dropped, expected.dropped);
    }
}
