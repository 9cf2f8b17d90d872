//! What defines a training computation, apart from data and files.

use moe_dispatch::DispatcherKind;
use moe_model::config::ModelConfig;
use moe_topology::{Attention, Folding};

use crate::optim::{Hyper, ParamGroup};
use crate::schedule::LrSchedule;

/// Everything that a rank needs to know to train, the same on all ranks.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The model.
    pub model: ModelConfig,
    /// Which rank does what.
    pub folding: Folding,
    /// How tokens reach their experts.
    pub dispatcher: DispatcherKind,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Sequences of a step over all ranks, G.
    pub global_batch_size: usize,
    /// Sequences that go through the pipeline together, b.
    pub micro_batch_size: usize,
    /// Tokens of a sequence, S.
    pub sequence_length: usize,
    /// Constants of the optimizer.
    pub optimizer: Hyper,
    /// Tensors that are updated in another way, or not at all.
    pub groups: Vec<ParamGroup>,
    /// Learning rate by step.
    pub lr: LrSchedule,
    /// Largest gradient norm; 0 for no clipping.
    pub clip_grad: f64,
}

impl Setup {
    /// Micro-batches of a step over all ranks, U.
    pub fn micro_batches(&self) -> usize {
        self.global_batch_size / self.micro_batch_size
    }

    /// Micro-batches of a step on one data-parallel rank.
    pub fn micro_batches_per_rank(&self) -> usize {
        self.micro_batches() / self.folding.size(Attention::DP)
    }
}
