//! Steps whose loss or gradient was not finite.

use serde::{Deserialize, Serialize};

use super::StepReport;

/// How many steps were skipped because their loss or gradient was not finite. Reports are the same on all ranks, so all
/// ranks that count them decide the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedSteps {
    /// Of the whole run.
    pub total: u64,
    /// Without a finite step since.
    pub in_a_row: u64,
}

impl SkippedSteps {
    /// Counts a step. False, and nothing counted, if it is one more in a row than `limit`: the run must stop, and its state is
    /// still that before the step.
    #[must_use]
    pub fn count(&mut self, report: &StepReport, limit: u64) -> bool {
        if report.is_finite() {
            self.in_a_row = 0;
            return true;
        }
        if self.in_a_row >= limit {
            return false;
        }
        self.total += 1;
        self.in_a_row += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(loss: Option<f64>, grad_norm: f64) -> StepReport {
        StepReport {
            step: 1,
            loss,
            total_loss: loss,
            grad_norm,
            lr: 0.1,
            aux_loss: 0.0,
            sequence_aux_loss: 0.0,
            global_aux_loss: 0.0,
            z_loss: 0.0,
            dropped_tokens: 0,
            reruns: 0,
            expert_load: Vec::new(),
            moe_layers: Vec::new(),
            updated: false,
        }
    }

    #[test]
    fn a_finite_step_starts_the_row_again() {
        let (fine, nan) = (report(Some(1.0), 1.0), report(Some(1.0), f64::NAN));
        let mut skipped = SkippedSteps::default();
        let went_on: Vec<bool> =
            [&nan, &nan, &fine, &nan, &nan, &nan].map(|report| skipped.count(report, 2)).into();
        assert_eq!(went_on, [true, true, true, true, true, false]);
        assert_eq!(skipped, SkippedSteps { total: 4, in_a_row: 2 });
        assert!(!skipped.count(&nan, 2) && skipped.count(&nan, 3));
    }

    #[test]
    fn without_patience_the_first_stops() {
        let mut skipped = SkippedSteps::default();
        for bad in
            [report(Some(f64::INFINITY), 1.0), report(None, f64::INFINITY), report(Some(1.0), f64::NAN)]
        {
            assert!(!skipped.count(&bad, 0));
        }
        // Where no token counts there is no loss, which is no fault.
        assert!(skipped.count(&report(None, 0.0), 0));
        assert_eq!(skipped, SkippedSteps::default());
    }
}
