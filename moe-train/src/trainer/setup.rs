//! What defines a training computation, apart from data and files.

use std::path::PathBuf;

use moe_dispatch::DispatcherKind;
use moe_model::config::ModelConfig;
use moe_model::{ExpertCapacity, ForcedRouting, Objective, PipelineLayout, RecomputeModules};
use moe_pipeline::generate::{Named, forward_only_over};
use moe_pipeline::{Program, lower, validate};
use moe_topology::{Attention, Folding};

use crate::config::{ConfigError, training_passes};
use crate::data::{BatchSizes, RampUp};
use crate::optim::{Hyper, ParamGroup};
use crate::schedule::LrSchedule;
use crate::{Error, Result};

/// Everything that a rank needs to know to train, the same on all ranks.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The model.
    pub model: ModelConfig,
    /// Which rank does what.
    pub folding: Folding,
    /// Which layers are on which pipeline rank: where the schedule [has them](Named::placement).
    pub pipeline: PipelineLayout,
    /// In which order ranks pass micro-batches through their stages. Changes no bit.
    pub schedule: Named,
    /// Micro-batches that go through one virtual stage of a rank before the next; PP unless given.
    pub micro_batch_group_size: Option<usize>,
    /// How tokens reach their experts.
    pub dispatcher: DispatcherKind,
    /// What experts take of a micro-batch; without, nothing is dropped.
    pub capacity: Option<ExpertCapacity>,
    /// Whether shared experts compute while rows are on their way to the experts.
    pub moe_shared_expert_overlap: bool,
    /// Rows that an expert-parallel rank may receive of a micro-batch, in multiples of what it would if all experts were
    /// chosen equally often; any number without. A step in which a rank would receive more is made again without.
    pub expert_rank_capacity: Option<f64>,
    /// What backward makes again instead of keeping it.
    pub recompute: RecomputeModules,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Sequences of a step over all ranks, G, after the ramp-up.
    pub global_batch_size: usize,
    /// Smaller steps at the start.
    pub rampup_batch_size: Option<RampUp>,
    /// Sequences that go through the pipeline together, b.
    pub micro_batch_size: usize,
    /// Tokens of a sequence, S.
    pub sequence_length: usize,
    /// Whether a layer's gradients are reduced while earlier layers are at their backward pass. Changes no bit.
    pub overlap_grad_reduce: bool,
    /// Whether a layer's updated weights are gathered while the next step goes on, until that layer. Changes no bit.
    pub overlap_param_gather: bool,
    /// Constants of the optimizer.
    pub optimizer: Hyper,
    /// Tensors that are updated in another way, or not at all.
    pub groups: Vec<ParamGroup>,
    /// Learning rate by step.
    pub lr: LrSchedule,
    /// Largest gradient norm; 0 for no clipping.
    pub clip_grad: f64,
    /// How far an update moves the biases of routers, where they have one.
    pub expert_bias_update_rate: f64,
    /// A load that training is given instead of what routers choose.
    pub forced_routing: Option<ForcedRouting>,
    /// The folder to which the choices of every step are written.
    pub record_routing: Option<PathBuf>,
    /// The folder from which the choices of every step are read, instead of made.
    pub replay_routing: Option<PathBuf>,
}

impl Setup {
    /// Sequences of every step.
    ///
    /// # Errors
    /// The ramp-up does not lead to G.
    pub fn batch_sizes(&self) -> Result<BatchSizes> {
        Ok(BatchSizes::new(self.global_batch_size, self.rampup_batch_size).map_err(ConfigError::from)?)
    }

    /// Micro-batches over all ranks, U, of a step of G sequences.
    pub fn micro_batches(&self) -> usize {
        self.global_batch_size / self.micro_batch_size
    }

    /// The constants of the objective in a step of `sequences` sequences without padding.
    pub fn objective(&self, sequences: usize) -> Objective {
        let (micro_batches, tokens) = (sequences / self.micro_batch_size, sequences * self.sequence_length);
        Objective { micro_batches, sequences, tokens }
    }

    /// The passes over the pipeline of a training step of `sequences` sequences.
    ///
    /// # Errors
    /// The schedule is for another number of virtual stages, has them on other ranks than `pipeline`, or does not take so many
    /// micro-batches.
    pub fn training_program(&self, sequences: usize) -> Result<Program> {
        let stages = [self.pipeline.ranks(), self.pipeline.virtual_stages()];
        let micro_batches = sequences / (self.micro_batch_size * self.folding.size(Attention::DP));
        let schedule = training_passes(self.schedule, stages, micro_batches, self.micro_batch_group_size)?;
        if schedule.placement() != self.pipeline.placement() {
            return Err(Error::StagePlacement { schedule: self.schedule });
        }
        Ok(validate(lower(&schedule)?, None)?)
    }

    /// The passes of an evaluation of `micro_batches` micro-batches per data-parallel rank.
    ///
    /// # Errors
    /// There is no micro-batch.
    pub fn evaluation_program(&self, micro_batches: usize) -> Result<Program> {
        let schedule = forward_only_over(self.pipeline.placement(), micro_batches as u32)?;
        Ok(validate(lower(&schedule)?, None)?)
    }
}
