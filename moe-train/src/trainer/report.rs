//! What a step measured, summed over all ranks.

use moe_comm::Reduction;
use moe_dispatch::RouterStats;
use moe_kernels::{Backend, Float};
use moe_model::config::AuxLossScope;
use moe_model::{Cx, Objective};
use moe_topology::{Attention, Folding};
use serde::{Deserialize, Serialize};

use super::Setup;
use crate::Result;

/// Measurements of one step, the same on all ranks; meanings as in `docs/semantics.md`.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss per unit of loss weight, nats; none if no token counted.
    pub loss: Option<f64>,
    /// The objective: `loss` plus the weighted auxiliary losses.
    pub total_loss: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Mean over MoE layers of the load-balancing loss, without its coefficient; that over all layers, if that is asked for.
    pub aux_loss: f64,
    /// The same with each sequence as a unit.
    pub sequence_aux_loss: f64,
    /// The same with the whole step as one unit.
    pub global_aux_loss: f64,
    /// Mean over MoE layers of the z-loss, without its coefficient.
    pub z_loss: f64,
    /// Dropped (token, expert) pairs over all layers.
    pub dropped_tokens: u64,
    /// How often all passes were made again because an expert-parallel rank would have received more than its budget of
    /// rows; all else is of the last time.
    pub reruns: u64,
    /// Share of the choices that each expert got, per MoE layer.
    pub expert_load: Vec<Vec<f64>>,
    /// What the means and the sum above are made of, per MoE layer.
    pub moe_layers: Vec<MoeLayerReport>,
    /// False if the loss or the gradient was not finite, or no token counted: weights stayed as they were.
    pub updated: bool,
}

impl StepReport {
    /// Whether the loss and the gradient are finite. Where no token counts there is no loss, which is no fault.
    pub fn is_finite(&self) -> bool {
        self.grad_norm.is_finite() && self.loss.is_none_or(f64::is_finite)
    }
}

/// Measurements of one MoE layer in one step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MoeLayerReport {
    /// Which decoder layer it is, from 0.
    pub layer: usize,
    /// Load-balancing loss with each micro-batch as a unit, without its coefficient; balanced is 1.
    pub aux_loss: f64,
    /// The same with each sequence as a unit.
    pub sequence_aux_loss: f64,
    /// The same with the whole step as one unit.
    pub global_aux_loss: f64,
    /// The z-loss, without its coefficient.
    pub z_loss: f64,
    /// The largest load of an expert relative to the mean; 0 if no token was routed.
    pub max_expert_load: f64,
    /// Dropped (token, expert) pairs.
    pub dropped_tokens: u64,
}

/// Sums over the world of a step's forward passes.
#[derive(Debug)]
pub(super) struct Totals {
    loss: f64,
    counts: Vec<Vec<f64>>,
    plain_counts: Vec<Vec<f64>>,
    prob_sums: Vec<Vec<f64>>,
    aux: Vec<f64>,
    sequence_aux: Vec<f64>,
    model_aux: f64,
    z: Vec<f64>,
    dropped: Vec<f64>,
    overflows: f64,
}

impl Totals {
    /// Adds up what all ranks saw. Collective over the world.
    pub fn reduce<T: Float, D: Backend<T>>(cx: &Cx<T, D>, setup: &Setup, rank: usize) -> Result<Self> {
        let (layers, experts) = (setup.model.num_hidden_layers, setup.model.num_local_experts);
        let width = 3 * experts + 5;
        let mut sums = vec![0.0; 2 + layers * width];
        // All tensor-parallel ranks hold the same loss; each holds its own tokens' routing.
        if counts_loss(&setup.folding, rank) {
            sums[0] = cx.stats.loss.total(&cx.device)?;
        }
        sums[1] = f64::from(u8::from(cx.stats.overflowed));
        for (layer, stats) in cx.stats.moe.read(&cx.device)? {
            let row = &mut sums[2 + layer * width..][..width];
            let counts = stats.expert_counts.iter().map(|&count| count as f64);
            let plain = stats.plain_counts.iter().map(|&count| count as f64);
            let RouterStats { aux_loss, sequence_aux_loss, z_loss_sum, model_aux_loss, dropped, .. } = stats;
            let losses = [aux_loss, sequence_aux_loss, z_loss_sum, dropped as f64, model_aux_loss];
            let all = counts.chain(plain).chain(stats.prob_sums.iter().copied()).chain(losses);
            row.iter_mut().zip(all).for_each(|(sum, value)| *sum = value);
        }
        let sums = cx.comms.group(Attention::ALL)?.all_reduce_host(&sums, Reduction::Sum)?;
        let all: Vec<_> = sums[2..].chunks_exact(width).collect();
        let rows = || setup.model.moe_layers().map(|layer| all[layer]);
        Ok(Totals {
            loss: sums[0],
            overflows: sums[1],
            counts: rows().map(|row| row[..experts].to_vec()).collect(),
            plain_counts: rows().map(|row| row[experts..2 * experts].to_vec()).collect(),
            prob_sums: rows().map(|row| row[2 * experts..3 * experts].to_vec()).collect(),
            aux: rows().map(|row| row[3 * experts]).collect(),
            sequence_aux: rows().map(|row| row[3 * experts + 1]).collect(),
            z: rows().map(|row| row[3 * experts + 2]).collect(),
            dropped: rows().map(|row| row[3 * experts + 3]).collect(),
            model_aux: rows().map(|row| row[3 * experts + 4]).sum(),
        })
    }

    /// Whether any rank would have received more rows for its experts than it may, so that the sums are worth nothing.
    pub fn overflowed(&self) -> bool {
        self.overflows > 0.0
    }

    /// Σ w·ce.
    pub fn loss_sum(&self) -> f64 {
        self.loss
    }

    /// How often all tokens chose each expert of layer `layer`, before dropping; none if it has no experts.
    pub fn expert_counts(&self, setup: &Setup, layer: usize) -> Vec<u64> {
        let row = setup.model.moe_layers().position(|l| l == layer);
        // Sums of integers below 2^53 are exact.
        row.map_or_else(Vec::new, |row| self.counts[row].iter().map(|&count| count as u64).collect())
    }

    /// `E Σ_e C_e·P_e` of each layer, both of the whole step.
    fn global_aux(&self) -> Vec<f64> {
        let layers = self.plain_counts.iter().zip(&self.prob_sums);
        let of_layer = |(counts, probs): (&Vec<f64>, &Vec<f64>)| {
            let sum: f64 = counts.iter().zip(probs).map(|(c, p)| c * p).sum();
            counts.len() as f64 * sum
        };
        layers.map(of_layer).collect()
    }

    /// The report of a step, not updated yet.
    pub fn report(
        &self,
        setup: &Setup,
        objective: Objective,
        step: u64,
        total_weight: f64,
        grad_norm: f64,
    ) -> StepReport {
        let layers = self.aux.len().max(1) as f64;
        let [micro_batches, sequences] = [objective.micro_batches, objective.sequences].map(|n| n as f64);
        // Sums over no valid token are 0.
        let tokens = objective.tokens.max(1) as f64;
        let global_aux_of_layers = self.global_aux();
        let global_unit = setup.model.num_experts_per_tok as f64 * tokens.powi(2);
        let aux = self.aux.iter().sum::<f64>() / micro_batches;
        let sequence_aux = self.sequence_aux.iter().sum::<f64>() / sequences;
        let model_aux = self.model_aux / micro_batches;
        let global_aux = global_aux_of_layers.iter().sum::<f64>() / global_unit;
        let z = self.z.iter().sum::<f64>() / tokens;
        let expert_load: Vec<Vec<f64>> = self.counts.iter().map(|counts| shares(counts)).collect();
        let moe_layers = setup.model.moe_layers().enumerate().map(|(row, layer)| MoeLayerReport {
            layer,
            aux_loss: self.aux[row] / micro_batches,
            sequence_aux_loss: self.sequence_aux[row] / sequences,
            global_aux_loss: global_aux_of_layers[row] / global_unit,
            z_loss: self.z[row] / tokens,
            max_expert_load: expert_load[row].iter().copied().fold(0.0, f64::max)
                * expert_load[row].len() as f64,
            dropped_tokens: self.dropped[row] as u64,
        });
        let moe_layers = moe_layers.collect();
        // Loss weights whose sum is not a number are a fault, not the absence of tokens.
        let loss = (total_weight > 0.0 || total_weight.is_nan()).then(|| self.loss / total_weight);
        let model = &setup.model;
        let losses = model.aux_loss_coef(AuxLossScope::MicroBatch) * aux
            + model.aux_loss_coef(AuxLossScope::Sequence) * sequence_aux
            + model.aux_loss_coef(AuxLossScope::Global) * global_aux
            + model.aux_loss_coef(AuxLossScope::Model) * model_aux
            + model.router_z_loss_coef * z;
        StepReport {
            step,
            loss,
            total_loss: loss.map(|l| l + losses),
            grad_norm,
            lr: setup.lr.at(step),
            aux_loss: if model.choices_of_all_layers() > 0 { model_aux } else { aux / layers },
            sequence_aux_loss: sequence_aux / layers,
            global_aux_loss: global_aux / layers,
            z_loss: z / layers,
            dropped_tokens: self.dropped.iter().sum::<f64>() as u64,
            reruns: 0,
            expert_load,
            moe_layers,
            updated: false,
        }
    }
}

/// What each is of their sum; of nothing, nothing.
fn shares(counts: &[f64]) -> Vec<f64> {
    let sum: f64 = counts.iter().sum();
    counts.iter().map(|c| if sum > 0.0 { c / sum } else { 0.0 }).collect()
}

fn counts_loss(folding: &Folding, rank: usize) -> bool {
    folding.coordinate(rank, Attention::TP) == 0
}
