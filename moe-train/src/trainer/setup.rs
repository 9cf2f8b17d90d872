//! What defines a training computation, apart from data and files.

use moe_dispatch::DispatcherKind;
use moe_model::PipelineLayout;
use moe_model::config::ModelConfig;
use moe_pipeline::generate::{interleaved_1f1b, interleaved_forward_only};
use moe_pipeline::{Program, lower, validate};
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
    /// Which layers are on which pipeline rank.
    pub pipeline: PipelineLayout,
    /// Micro-batches that go through one virtual stage of a rank before the next; PP unless given.
    pub micro_batch_group_size: Option<usize>,
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

    /// The index of the first sequence of a step (from 1).
    pub fn first_sequence(&self, step: u64) -> u64 {
        (step - 1) * self.global_batch_size as u64
    }

    /// Micro-batches of a step on one data-parallel rank.
    pub fn micro_batches_per_rank(&self) -> usize {
        self.micro_batches() / self.folding.size(Attention::DP)
    }

    /// The passes of a training step over the pipeline: 1F1B, interleaved if ranks have several stages.
    ///
    /// # Errors
    /// Interleaved stages cannot work in such groups of so many micro-batches.
    pub fn training_program(&self) -> moe_pipeline::Result<Program> {
        let (ranks, stages) = self.ranks_and_stages();
        let group = self.micro_batch_group_size.map(|group| group as u32);
        let schedule = interleaved_1f1b(ranks, stages, self.micro_batches_per_rank() as u32, group)?;
        validate(lower(&schedule)?, None)
    }

    /// The passes of an evaluation of `micro_batches` micro-batches per data-parallel rank.
    ///
    /// # Errors
    /// There is no micro-batch.
    pub fn evaluation_program(&self, micro_batches: usize) -> moe_pipeline::Result<Program> {
        let (ranks, stages) = self.ranks_and_stages();
        validate(lower(&interleaved_forward_only(ranks, stages, micro_batches as u32)?)?, None)
    }

    fn ranks_and_stages(&self) -> (u32, u32) {
        (self.pipeline.ranks() as u32, self.pipeline.virtual_stages() as u32)
    }
}
