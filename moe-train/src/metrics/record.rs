//! The lines of `metrics.jsonl`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::trainer::MoeLayerReport;

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
    /// Those of each dataset of a blend.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blend_tokens: Vec<u64>,
    /// Input tokens of the step by its wall time, without evaluation and saving.
    pub tokens_per_second: f64,
    /// Operations that the model needs for them, in TFLOP/s of each rank: see [`Utilisation`](super::Utilisation).
    pub tflops_per_rank: f64,
    /// The same as a fraction of the device's peak, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// On a GPU, the most bytes of its memory that tensors have taken so far in this run, or since it was resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
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
    /// What the losses above are the means of, and `dropped_tokens` the sum, for each MoE layer.
    pub moe_layers: Vec<MoeLayerReport>,
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

    /// The numbers that are worth a curve, with their names; those of a layer as Megatron names them.
    pub(super) fn scalars(&self) -> Vec<(Cow<'static, str>, f64)> {
        let spread = self.load_spread();
        let scalars = [
            ("train/loss", self.loss),
            ("train/total_loss", self.total_loss),
            ("train/grad_norm", self.grad_norm),
            ("train/lr", Some(self.lr)),
            ("train/tokens", Some(self.tokens as f64)),
            ("train/tokens_per_second", Some(self.tokens_per_second)),
            ("train/tflops_per_rank", Some(self.tflops_per_rank)),
            ("train/mfu", self.mfu),
            ("train/peak_memory_bytes", self.peak_memory_bytes.map(|bytes| bytes as f64)),
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
        let whole = scalars.into_iter().filter_map(|(name, value)| Some((name.into(), value?)));
        let layers = self.moe_layers.iter().flat_map(|layer| {
            let scalars = [
                ("aux_loss", layer.aux_loss),
                ("sequence_aux_loss", layer.sequence_aux_loss),
                ("global_aux_loss", layer.global_aux_loss),
                ("z_loss", layer.z_loss),
                ("max_expert_load", layer.max_expert_load),
                ("dropped_tokens", layer.dropped_tokens as f64),
            ];
            scalars.map(|(name, value)| (format!("moe/{name}_layer_{}", layer.layer).into(), value))
        });
        whole.chain(layers).collect()
    }
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The step after which it was made.
    pub step: u64,
    /// Mean loss on held-out tokens, nats per token. Of several sets, the mean of theirs.
    pub val_loss: f64,
    /// Those of several sets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub val_losses: Vec<SetLoss>,
}

/// The loss on one of several held-out sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetLoss {
    /// Where its tokens are.
    pub path: String,
    /// Its mean loss, nats per token.
    pub loss: f64,
}

impl EvalRecord {
    /// Of the losses of all sets; none if there is none.
    pub fn new(step: u64, mut losses: Vec<SetLoss>) -> Option<Self> {
        if losses.is_empty() {
            return None;
        }
        let val_loss = losses.iter().map(|set| set.loss).sum::<f64>() / losses.len() as f64;
        if losses.len() == 1 {
            losses.clear();
        }
        Some(EvalRecord { step, val_loss, val_losses: losses })
    }

    /// The numbers that are worth a curve, with their names.
    pub(super) fn scalars(&self) -> Vec<(Cow<'static, str>, f64)> {
        let of_sets = self.val_losses.iter().map(|set| (format!("val/loss/{}", set.path).into(), set.loss));
        [("val/loss".into(), self.val_loss)].into_iter().chain(of_sets).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_have_curves_under_their_own_numbers() {
        let layer = |layer, z_loss| MoeLayerReport {
            layer,
            aux_loss: 1.1,
            sequence_aux_loss: 1.2,
            global_aux_loss: 1.3,
            z_loss,
            max_expert_load: 1.5,
            dropped_tokens: 7,
        };
        let record = StepRecord {
            step: 1,
            loss: None,
            total_loss: None,
            grad_norm: None,
            lr: 0.1,
            tokens: 1,
            blend_tokens: Vec::new(),
            tokens_per_second: 1.0,
            tflops_per_rank: 2.0,
            mfu: Some(0.5),
            peak_memory_bytes: Some(1 << 40),
            aux_loss: 1.1,
            sequence_aux_loss: 1.2,
            global_aux_loss: 1.3,
            z_loss: 3.0,
            dropped_tokens: 14,
            reruns: 0,
            skipped_steps: 0,
            expert_load: Vec::new(),
            moe_layers: vec![layer(1, 2.0), layer(3, 4.0)],
        };
        let scalars = record.scalars();
        let of_layer_3: Vec<_> = scalars.iter().filter(|(name, _)| name.ends_with("_layer_3")).collect();
        let named = |name: &str, value| (format!("moe/{name}_layer_3").into(), value);
        let wanted = [
            named("aux_loss", 1.1),
            named("sequence_aux_loss", 1.2),
            named("global_aux_loss", 1.3),
            named("z_loss", 4.0),
            named("max_expert_load", 1.5),
            named("dropped_tokens", 7.0),
        ];
        assert_eq!(of_layer_3, wanted.each_ref());
        assert!(scalars.contains(&("moe/z_loss_layer_1".into(), 2.0)));
        assert!(scalars.contains(&("train/tflops_per_rank".into(), 2.0)));
        let known = [("train/mfu".into(), 0.5), ("train/peak_memory_bytes".into(), 2f64.powi(40))];
        assert!(known.iter().all(|scalar| scalars.contains(scalar)));
        let unknown = StepRecord { mfu: None, peak_memory_bytes: None, ..record }.scalars();
        assert!(known.iter().all(|(name, _)| unknown.iter().all(|(other, _)| other != name)));
    }
}
