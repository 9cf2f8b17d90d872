//! A model with weights that were read, without an optimizer or a run, under any folding.

use std::time::Duration;

use moe_comm::World;
use moe_kernels::{Backend, Device, Float};
use moe_model::axes::communicators;
use moe_model::config::ModelConfig;
use moe_model::params::ParamLayoutBuilder;
use moe_model::{
    CommTransport, Cx, DecoderStage, Execution, Objective, PipelineLayout, RopeTable, Stats, TypedStage,
};
use moe_topology::{Attention, Constraints, Folding};

use crate::Result;
use crate::checkpoint::{Weights, read_params};
use crate::config::ParallelConfig;

/// Communication that takes longer means that a rank is stuck.
pub(crate) const DEADLINE: Duration = Duration::from_secs(600);

/// Passes of micro-batches of one shape through a model under a folding, the same on all ranks.
#[derive(Debug)]
pub(crate) struct Passes {
    pub model: ModelConfig,
    pub folding: Folding,
    pub pipeline: PipelineLayout,
    pub execution: Execution,
    /// Sequences of a micro-batch.
    pub batch: usize,
    /// Positions of a sequence.
    pub length: usize,
}

impl Passes {
    /// Through `model`, of sequences of `length` positions or a few more, so that the folding divides them. How many of them
    /// make up a micro-batch, `batch` says of that length and the number of data-parallel ranks.
    ///
    /// # Errors
    /// The folding is illegal for the model.
    pub fn new(
        model: ModelConfig,
        parallel: &ParallelConfig,
        execution: Execution,
        length: usize,
        batch: impl FnOnce(usize, usize) -> usize,
    ) -> Result<Self> {
        let constraints = parallel.constraints(&model);
        let dp = parallel.folding(&model, constraints.clone())?.size(Attention::DP);
        let length = length.next_multiple_of(parallel.sequence_multiple());
        let batch = batch(length, dp);
        let folding = parallel.folding(
            &model,
            Constraints {
                sequence_length: Some(length),
                global_batch_size: Some(batch * dp),
                micro_batch_size: batch,
                ..constraints
            },
        )?;
        let pipeline = parallel.pipeline(model.num_hidden_layers)?;
        Ok(Passes { model, folding, pipeline, execution, batch, length })
    }

    /// Data-parallel ranks.
    pub fn dp(&self) -> usize {
        self.folding.size(Attention::DP)
    }
}

/// A rank's stages and weights.
pub(crate) struct LoadedRank<T: Float, D: Backend<T>> {
    pub stages: Vec<TypedStage<T, D>>,
    pub transport: CommTransport<D>,
    pub cx: Cx<T, D>,
}

/// Statistics of a step that has seen nothing yet.
pub(crate) fn fresh_stats<T: Float, D: Device>(stages: &[TypedStage<T, D>], device: &D) -> Result<Stats<D>> {
    let moe = DecoderStage::moe_stats(stages.iter().map(|stage| &**stage), device)?;
    Ok(Stats { moe, ..Stats::default() })
}

impl<T: Float, D: Backend<T>> LoadedRank<T, D> {
    /// Reads what this rank has of `weights`. Of the objective nothing is known yet. Collective over the world.
    ///
    /// # Errors
    /// The weights are damaged, or not those of the model.
    pub fn open(passes: &Passes, weights: &Weights, world: &dyn World<D>, device: D) -> Result<Self> {
        let Passes { model, folding, pipeline, execution, batch, length } = passes;
        let mut layout = ParamLayoutBuilder::new(folding, world.rank());
        let stages = DecoderStage::of_rank(&mut layout, model, *execution, pipeline)?;
        let stages: Vec<TypedStage<T, D>> = stages.into_iter().map(TypedStage::new).collect();
        let params = read_params(layout.build(), weights, &device)?;
        let groups = communicators::<D>().attention(Attention::PP).attention(Attention::DP);
        let comms = groups.build(world, &device, folding)?;
        let rows = batch * length / (folding.size(Attention::CP) * folding.size(Attention::TP));
        let shape = [rows, model.hidden_size];
        let transport = CommTransport::new(world, &device, folding, shape, model.choices_of_all_layers())?;
        let rope = RopeTable::of(&device, model, *length)?;
        let objective = Objective { micro_batches: 0, sequences: 0, tokens: 0 };
        let mut cx = Cx::new(device, comms, params, rope, objective);
        cx.stats = fresh_stats(&stages, &cx.device)?;
        Ok(LoadedRank { stages, transport, cx })
    }
}
