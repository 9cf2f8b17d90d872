//! The lines of `metrics.jsonl`.

use serde::{Deserialize, Serialize};

/// One training step. JSON has no infinity and no NaN: they are `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss, Σ w·ce / N, nats; none if no token counted.
    pub loss: Option<f64>,
    /// The objective: `loss` and the weighted auxiliary losses.
    pub total_loss: Option<f64>,
    /// Norm of the gradient before clipping; none if it is not finite.
    pub grad_norm: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Input tokens of the run so far.
    pub tokens: u64,
    /// Input tokens of the step by its wall time, without evaluation and saving.
    pub tokens_per_second: f64,
    /// Mean over MoE layers of the load-balancing loss, without its coefficient; balanced is 1. That over all layers, if that
    /// is asked for; balanced is then K.
    pub aux_loss: f64,
    /// The same with each sequence, not each micro-batch, as a unit.
    pub sequence_aux_loss: f64,
    /// The same with the whole step as one unit.
    pub global_aux_loss: f64,
    /// Mean over MoE layers of the z-loss, without its coefficient.
    pub z_loss: f64,
    /// Dropped (token, expert) pairs of all layers.
    pub dropped_tokens: u64,
    /// How often the passes of the step were made again because the rows for a rank's experts were more than its budget.
    pub reruns: u64,
    /// Steps of the run so far that were skipped because their loss or gradient was not finite.
    pub skipped_steps: u64,
    /// Share of the choices that each expert got, `[MoE layers][experts]`.
    pub expert_load: Vec<Vec<f64>>,
}

impl StepRecord {
    /// The smallest and the largest load of any expert of any layer, relative to a balanced one.
    pub fn load_spread(&self) -> Option<(f64, f64)> {
        let relative =
            self.expert_load.iter().flat_map(|layer| layer.iter().map(|load| load * layer.len() as f64));
        relative.fold(None, |spread, load| match spread {
            None => Some((load, load)),
            Some((low, high)) => Some((load.min(low), load.max(high))),
        })
    }

    /// The numbers that are worth a curve, with their names.
    pub(super) fn scalars(&self) -> Vec<(&'static str, f64)> {
        let spread = self.load_spread();
        let scalars = [
            ("train/loss", self.loss),
            ("train/total_loss", self.total_loss),
            ("train/grad_norm", self.grad_norm),
            ("train/lr", Some(self.lr)),
            ("train/tokens", Some(self.tokens as f64)),
            ("train/tokens_per_second", Some(self.tokens_per_second)),
            ("train/skipped_steps", Some(self.skipped_steps as f64)),
            ("moe/aux_loss", Some(self.aux_loss)),
            ("moe/sequence_aux_loss", Some(self.sequence_aux_loss)),
            ("moe/global_aux_loss", Some(self.global_aux_loss)),
            ("moe/z_loss", Some(self.z_loss)),
            ("moe/dropped_tokens", Some(self.dropped_tokens as f64)),
            ("moe/reruns", Some(self.reruns as f64)),
            ("moe/min_expert_load", spread.map(|(low, _)| low)),
            ("moe/max_expert_load", spread.map(|(_, high)| high)),
        ];
        scalars.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The step after which it was made.
    pub step: u64,
    /// Mean loss on held-out text, nats per token.
    pub val_loss: f64,
}
