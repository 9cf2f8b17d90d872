//! Numbers for the metrics, added up where they are made.

use std::ops::Range;

use moe_kernels::{Device, Tensor, ViewMut};

use crate::Error;

/// What one router saw over the micro-batches of a step, on this rank. Tokens are the valid ones.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterStats {
    /// How often this rank's tokens chose each expert, before dropping.
    pub expert_counts: Vec<i64>,
    /// How often each expert was among the K best of this rank's tokens without bias and groups: what the load-balancing
    /// losses count.
    pub plain_counts: Vec<i64>,
    /// `P_e`, the sum over this rank's tokens of their share of the scores. The loss of the whole step is
    /// `E/(K·T_v²) Σ_e C_e·P_e` with both summed over its micro-batches and all ranks of the stage.
    pub prob_sums: Vec<f64>,
    /// This rank's part of the load-balancing losses of the micro-batches, `E/(K·T²) Σ_e C_e·P_e` with `P_e` over its own
    /// tokens, without coefficient. The loss of the step is the sum over all ranks, divided by the number of
    /// micro-batches.
    pub aux_loss: f64,
    /// The same for each sequence, summed over the sequences. The loss of the step is the sum over all ranks, divided by the
    /// number of sequences.
    pub sequence_aux_loss: f64,
    /// `Σ logsumexp²` over this rank's tokens. The z-loss of the step is the sum over all ranks, divided by the number of
    /// tokens.
    pub z_loss_sum: f64,
    /// This rank's and layer's part of the load-balancing losses over all layers, without coefficient: `E Σ_e C_e·P_e/(M·T)²`
    /// with `C` of the unit and all layers, added by backward passes; 0 without that loss.
    pub model_aux_loss: f64,
    /// Choices that were dropped.
    pub dropped: u64,
}

/// Statistics of several routers of as many experts, added up on the device, where no pass waits for them, until they are
/// [read](RouterSums::read).
#[derive(Debug)]
pub struct RouterSums<D: Device> {
    /// A row for each router: choices, plain choices and shares of the scores of each expert, then five numbers.
    sums: Tensor<f64, D>,
    num_experts: usize,
}

/// The statistics of one router, to be added to.
#[derive(Debug)]
pub struct RouterSum<'a, D: Device> {
    sums: ViewMut<'a, f64, D>,
    num_experts: usize,
}

/// Numbers behind those of each expert.
const NUMBERS: usize = 5;

impl<D: Device> RouterSums<D> {
    /// Statistics initialised to zero.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn zeros(device: &D, routers: usize, num_experts: usize) -> Result<Self, Error> {
        Ok(RouterSums { sums: Tensor::zeros(device, routers, 3 * num_experts + NUMBERS)?, num_experts })
    }

    /// The accumulator of router `router`.
    ///
    /// # Errors
    /// There are no more than `router` of them.
    pub fn of(&mut self, router: usize) -> Result<RouterSum<'_, D>, Error> {
        let sums = self.sums.view_mut()?.rows(router..router + 1)?;
        Ok(RouterSum { sums, num_experts: self.num_experts })
    }

    /// What they are by now, router by router. Waits for the device, once.
    ///
    /// # Errors
    /// What the device found until then, among it a logit that is not a number.
    pub fn read(&self, device: &D) -> moe_kernels::Result<Vec<RouterStats>> {
        let (sums, e) = (self.sums.to_vec(device)?, self.num_experts);
        // Those below 2^53 are exact.
        let counts = |sums: &[f64]| sums.iter().map(|&count| count as i64).collect();
        let stats = sums.chunks_exact(3 * e + NUMBERS).map(|sums| RouterStats {
            expert_counts: counts(&sums[..e]),
            plain_counts: counts(&sums[e..2 * e]),
            prob_sums: sums[2 * e..3 * e].to_vec(),
            aux_loss: sums[3 * e],
            sequence_aux_loss: sums[3 * e + 1],
            z_loss_sum: sums[3 * e + 2],
            model_aux_loss: sums[3 * e + 3],
            dropped: sums[3 * e + 4] as u64,
        });
        Ok(stats.collect())
    }
}

impl<'a, D: Device> RouterSum<'a, D> {
    fn columns(&mut self, columns: Range<usize>) -> Result<ViewMut<'_, f64, D>, Error> {
        Ok(self.sums.reborrow().columns(columns)?)
    }

    /// Counts, shares and the losses of the micro-batch and of sequences, `[1, 3E + 2]`.
    pub(super) fn balance(&mut self) -> Result<ViewMut<'_, f64, D>, Error> {
        self.columns(0..3 * self.num_experts + 2)
    }

    pub(super) fn z_loss(&mut self) -> Result<ViewMut<'_, f64, D>, Error> {
        self.columns(3 * self.num_experts + 2..3 * self.num_experts + 3)
    }

    pub(super) fn model_aux_loss(&mut self) -> Result<ViewMut<'_, f64, D>, Error> {
        self.columns(3 * self.num_experts + 3..3 * self.num_experts + 4)
    }

    /// The number of choices that were dropped, `[1, 1]`.
    ///
    /// # Errors
    /// None, as it is made.
    pub fn dropped(&mut self) -> Result<ViewMut<'_, f64, D>, Error> {
        self.columns(3 * self.num_experts + 4..3 * self.num_experts + 5)
    }
}
