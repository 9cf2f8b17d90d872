//! The learning rate by step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Linear warm-up, `max·t/W` for `t ≤ W`, then what [`LrShape`] says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The largest rate, reached at the end of the warm-up.
    pub max: f64,
    /// The rate at the end of the decay.
    pub min: f64,
    /// Warm-up, W, in steps.
    pub warmup_steps: u64,
    /// What follows.
    pub shape: LrShape,
}

/// The rate after the warm-up, `t > W`. The formulas are Megatron's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrShape {
    /// `max`.
    Constant,
    /// `max(min, max·√(W'/t))` with `W' = max(W, 1)`: no end, and no jump at one.
    InverseSquareRoot,
    /// `min + (max−min)·f((t−W)/(D−W))` for `t < D`, then `min`.
    Decay {
        /// The step at which the decay ends, D.
        decay_steps: u64,
        /// f.
        style: DecayStyle,
    },
    /// Warm-up, stable, decay ([arXiv 2404.06395](https://arxiv.org/abs/2404.06395)): `max` for `t ≤ D−L`,
    /// `min + (max−min)·f((t−D+L)/L)` for `t < D`, then `min`.
    StableDecay {
        /// The step at which the decay ends, D.
        decay_steps: u64,
        /// Its length, L.
        length: u64,
        /// f.
        style: DecayStyle,
    },
}

/// How a decay goes from 1 to 0 while its phase x goes from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecayStyle {
    /// `1 − x`.
    Linear,
    /// `½(1 + cos πx)`.
    Cosine,
    /// `1 − √x`.
    MinusSqrt,
}

impl DecayStyle {
    fn at(self, phase: f64) -> f64 {
        match self {
            DecayStyle::Linear => 1.0 - phase,
            DecayStyle::Cosine => 0.5 * (1.0 + (PI * phase).cos()),
            DecayStyle::MinusSqrt => 1.0 - phase.sqrt(),
        }
    }
}

impl LrSchedule {
    /// The rate of step `step`, from 1.
    pub fn at(&self, step: u64) -> f64 {
        let LrSchedule { max, min, warmup_steps, shape } = *self;
        if step <= warmup_steps {
            return max * step as f64 / warmup_steps as f64;
        }
        let decay = |from: u64, to: u64, style: DecayStyle| match step {
            step if step >= to => min,
            step if step <= from => max,
            step => min + (max - min) * style.at((step - from) as f64 / (to - from) as f64),
        };
        match shape {
            LrShape::Constant => max,
            LrShape::InverseSquareRoot => (max * (warmup_steps.max(1) as f64 / step as f64).sqrt()).max(min),
            LrShape::Decay { decay_steps, style } => decay(warmup_steps, decay_steps, style),
            LrShape::StableDecay { decay_steps, length, style } => {
                decay(decay_steps.saturating_sub(length), decay_steps, style)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLES: [DecayStyle; 3] = [DecayStyle::Linear, DecayStyle::Cosine, DecayStyle::MinusSqrt];

    fn cosine(decay_steps: u64) -> LrShape {
        LrShape::Decay { decay_steps, style: DecayStyle::Cosine }
    }

    #[test]
    fn warms_up_decays_and_stays() {
        let lr = LrSchedule { max: 1.0, min: 0.1, warmup_steps: 4, shape: cosine(14) };
        assert_eq!(lr.at(1), 0.25);
        assert_eq!(lr.at(4), 1.0);
        assert!((lr.at(9) - 0.55).abs() < 1e-15);
        assert!(lr.at(13) > 0.1 && lr.at(13) < lr.at(12));
        assert_eq!(lr.at(14), 0.1);
        assert_eq!(lr.at(1_000_000), 0.1);
    }

    #[test]
    fn no_warm_up_and_no_decay() {
        let lr = LrSchedule { max: 1.0, min: 0.1, warmup_steps: 0, shape: cosine(0) };
        assert_eq!(lr.at(1), 0.1);
        let lr = LrSchedule { max: 1.0, min: 1.0, warmup_steps: 0, shape: cosine(10) };
        assert_eq!(lr.at(5), 1.0);
    }

    /// Values worked out by hand.
    #[test]
    fn known_values() {
        let lr = |shape| LrSchedule { max: 3.0, min: 1.0, warmup_steps: 4, shape };
        let decay = |style| lr(LrShape::Decay { decay_steps: 20, style });
        let stable = |style| lr(LrShape::StableDecay { decay_steps: 20, length: 8, style });
        for (schedule, step, value) in [
            (lr(LrShape::Constant), 3, 2.25),
            (lr(LrShape::Constant), 5, 3.0),
            (lr(LrShape::Constant), 1_000_000, 3.0),
            (lr(LrShape::InverseSquareRoot), 16, 1.5),
            (lr(LrShape::InverseSquareRoot), 25, 1.2),
            (lr(LrShape::InverseSquareRoot), 36, 1.0),
            (lr(LrShape::InverseSquareRoot), 37, 1.0),
            (decay(DecayStyle::Linear), 8, 2.5),
            (decay(DecayStyle::Linear), 16, 1.5),
            (decay(DecayStyle::Cosine), 12, 2.0),
            (decay(DecayStyle::Cosine), 8, 2.0 + 0.5f64.sqrt()),
            (decay(DecayStyle::MinusSqrt), 8, 2.0),
            (stable(DecayStyle::Linear), 12, 3.0),
            (stable(DecayStyle::Linear), 14, 2.5),
            (stable(DecayStyle::Cosine), 16, 2.0),
            (stable(DecayStyle::MinusSqrt), 14, 2.0),
            (stable(DecayStyle::MinusSqrt), 20, 1.0),
            (stable(DecayStyle::MinusSqrt), 21, 1.0),
        ] {
            assert!(
                (schedule.at(step) - value).abs() < 1e-14,
                "{schedule:?} at {step}: {}",
                schedule.at(step)
            );
        }
        // Without a warm-up the root counts from step 1.
        let root = LrSchedule { max: 3.0, min: 0.0, warmup_steps: 0, shape: LrShape::InverseSquareRoot };
        assert_eq!((root.at(1), root.at(9)), (3.0, 1.0));
    }

    /// With 10⁶ steps to each leg no rate jumps, least of all where legs meet, and none rises after the warm-up.
    #[test]
    fn legs_meet() {
        let leg = 1_000_000;
        let shapes = STYLES.into_iter().flat_map(|style| {
            [
                LrShape::Decay { decay_steps: 3 * leg, style },
                LrShape::StableDecay { decay_steps: 3 * leg, length: leg, style },
            ]
        });
        for shape in shapes.chain([LrShape::Constant, LrShape::InverseSquareRoot]) {
            let lr = LrSchedule { max: 1.0, min: 0.25, warmup_steps: leg, shape };
            for joint in [leg, 2 * leg, 3 * leg, 16 * leg] {
                for step in joint - 3..joint + 3 {
                    let (here, next) = (lr.at(step), lr.at(step + 1));
                    // The root is steepest at its start: √1e-6.
                    assert!((next - here).abs() <= 0.75e-3 + 1e-12, "{shape:?} jumps after {step}");
                    assert!(step < leg || next <= here, "{shape:?} rises after {step}");
                }
            }
            assert_eq!(lr.at(leg), 1.0, "{shape:?}");
            assert_eq!(lr.at(100 * leg), if shape == LrShape::Constant { 1.0 } else { 0.25 }, "{shape:?}");
        }
    }
}
