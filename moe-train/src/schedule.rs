//! The learning rate by step.

use std::f64::consts::PI;

/// Linear warm-up, then half a cosine, then constant:
/// `max·t/W` for `t ≤ W`; `min + ½(max−min)(1 + cos(π(t−W)/(D−W)))` for `t ≤ D`; then `min`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// The largest rate, reached at the end of the warm-up.
    pub max: f64,
    /// The rate from step `decay_steps` on.
    pub min: f64,
    /// Warm-up, W, in steps.
    pub warmup_steps: u64,
    /// The step at which the decay ends, D.
    pub decay_steps: u64,
}

impl LrSchedule {
    /// The rate of step `step`, from 1.
    pub fn at(&self, step: u64) -> f64 {
        let LrSchedule { max, min, warmup_steps, decay_steps } = *self;
        if step <= warmup_steps {
            return max * step as f64 / warmup_steps as f64;
        }
        if step >= decay_steps {
            return min;
        }
        let phase = (step - warmup_steps) as f64 / (decay_steps - warmup_steps) as f64;
        min + 0.5 * (max - min) * (1.0 + (PI * phase).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_decays_and_stays() {
        let lr = LrSchedule { max: 1.0, min: 0.1, warmup_steps: 4, decay_steps: 14 };
        assert_eq!(lr.at(1), 0.25);
        assert_eq!(lr.at(4), 1.0);
        assert!((lr.at(9) - 0.55).abs() < 1e-15);
        assert!(lr.at(13) > 0.1 && lr.at(13) < lr.at(12));
        assert_eq!(lr.at(14), 0.1);
        assert_eq!(lr.at(1_000_000), 0.1);
    }

    #[test]
    fn no_warm_up_and_no_decay() {
        let lr = LrSchedule { max: 1.0, min: 0.1, warmup_steps: 0, decay_steps: 0 };
        assert_eq!(lr.at(1), 0.1);
        let lr = LrSchedule { max: 1.0, min: 1.0, warmup_steps: 0, decay_steps: 10 };
        assert_eq!(lr.at(5), 1.0);
    }
}
