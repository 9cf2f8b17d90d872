//! One rank of a training run.

use moe_comm::{CommsBuilder, Reduction, World};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::axes::{CP_DP, EXPERT_INSTANCE_GROUPS, INSTANCE_GROUPS, TP_CP_DP, communicators};
use moe_model::config::AuxLossScope;
use moe_model::params::{ParamLayout, ParamLayoutBuilder, ParamStore};
use moe_model::{
    CommTransport, CountingStage, Cx, DecoderStage, Execution, Mode, Recorded, RopeTable, Stats, TypedStage,
};
use moe_pipeline::{Program, execute};
use moe_topology::Attention;

use super::report::Totals;
use super::source::HostBatch;
use super::trace::StepTrace;
use super::{BatchSource, Sequence, Setup, StepReport};
use crate::Result;
use crate::data::BatchSizes;
use crate::optim::{Optimizer, ParamGroups, ParamNames, PendingGradNorm, model_tensors, reduce_gradients};
use crate::passes::fresh_stats;

/// What the passes of a step leave.
struct Passed<T: Float, D: Device> {
    /// This rank's slices of the reduced gradients, by bucket.
    grads: Vec<Tensor<T::Acc, D>>,
    norm: PendingGradNorm<D>,
    totals: Totals,
}

/// A rank's layers, parameters, optimizer state and communicators.
pub struct RankTrainer<T: Float, D: Backend<T>> {
    setup: Setup,
    batch_sizes: BatchSizes,
    rank: usize,
    cx: Cx<T, D>,
    stages: Vec<TypedStage<T, D>>,
    transport: CommTransport<D>,
    /// The passes of a training step of as many sequences as the objective has.
    program: Program,
    optimizer: Optimizer<T, D>,
    names: ParamNames,
}

impl<T: Float, D: Backend<T>> RankTrainer<T, D> {
    /// Makes the communicators and the starting state. Collective over the world.
    pub fn new(setup: Setup, world: &dyn World<D>, device: D) -> Result<Self> {
        Self::with(setup, world, device, |setup, groups, cx| {
            Optimizer::drawn(setup.optimizer, groups, cx, setup.seed)
        })
    }

    /// As [`new`](Self::new), but with weights of 0, for a checkpoint to be [read](crate::checkpoint::restore) into.
    pub fn zeros(setup: Setup, world: &dyn World<D>, device: D) -> Result<Self> {
        Self::with(setup, world, device, |setup, groups, cx| {
            Optimizer::of_weights(setup.optimizer, groups, cx)
        })
    }

    /// With the optimizer that `optimizer` makes for weights of 0. Collective over the world.
    fn with(
        setup: Setup,
        world: &dyn World<D>,
        device: D,
        optimizer: impl FnOnce(&Setup, &ParamGroups, &mut Cx<T, D>) -> Result<Optimizer<T, D>>,
    ) -> Result<Self> {
        let rank = world.rank();
        let (stages, layout) = build(&setup, rank)?;
        let params = ParamStore::zeros(layout, &device)?;
        let tensors = model_tensors(&setup.model)?;
        let groups = ParamGroups::new(&setup.groups, setup.optimizer.weight_decay, &tensors)?;
        let names = ParamNames::new(groups.trained().map(str::to_owned));
        let mut builder = communicators::<D>().attention(Attention::ALL).attention(Attention::PP);
        if setup.folding.size(Attention::DP_OUTER) > 1 {
            builder = INSTANCE_GROUPS.into_iter().fold(builder, CommsBuilder::attention);
            builder = EXPERT_INSTANCE_GROUPS.into_iter().fold(builder, CommsBuilder::expert);
        }
        let comms = builder.build(world, &device, &setup.folding)?;
        let rows = setup.micro_batch_size * setup.sequence_length
            / (setup.folding.size(Attention::CP) * setup.folding.size(Attention::TP));
        let shape = [rows, setup.model.hidden_size];
        let choices = setup.model.choices_of_all_layers();
        let transport = CommTransport::new(world, &device, &setup.folding, shape, choices)?;
        let rope = RopeTable::of(&device, &setup.model, setup.sequence_length)?;
        let batch_sizes = setup.batch_sizes()?;
        let objective = setup.objective(batch_sizes.of_step(1));
        let program = setup.training_program(objective.sequences)?;
        let mut cx = Cx::new(device, comms, params, rope, objective);
        cx.capacity = setup.capacity;
        cx.forced_routing = setup.forced_routing;
        let optimizer = optimizer(&setup, &groups, &mut cx)?;
        Ok(RankTrainer {
            setup,
            batch_sizes,
            rank,
            cx,
            stages: stages.into_iter().map(TypedStage::new).collect(),
            transport,
            program,
            optimizer,
            names,
        })
    }

    /// What defines the computation.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The optimizer's state.
    pub fn optimizer(&self) -> &Optimizer<T, D> {
        &self.optimizer
    }

    /// The rank's context.
    pub fn cx(&self) -> &Cx<T, D> {
        &self.cx
    }

    /// Waits for the weights of the last step's update, which the next pass over the layers else does. Before they are
    /// read from the [context](Self::cx).
    pub fn await_weights(&mut self) -> Result<()> {
        Ok(self.cx.params.await_all_weights()?)
    }

    /// The optimizer and the context, to restore a checkpoint.
    pub(crate) fn state_mut(&mut self) -> (&mut Optimizer<T, D>, &mut Cx<T, D>) {
        (&mut self.optimizer, &mut self.cx)
    }

    /// One training step (from 1): forward and backward of all micro-batches, reduction, clipping, update. Collective.
    pub fn step(&mut self, step: u64, source: &dyn BatchSource) -> Result<StepReport> {
        self.cx.mode = Mode::Train { seed: self.setup.seed, step };
        self.set_batch_size(self.batch_sizes.of_step(step))?;
        let per_rank = self.cx.objective.micro_batches / self.setup.folding.size(Attention::DP);
        let first = self.batch_sizes.cursor(step);
        let total_weight = self.load(per_rank, first, |u| source.micro_batch(step, u))?;
        self.cx.expert_rank_capacity = self.setup.expert_rank_capacity;
        let mut passed = self.passes(step, first)?;
        let overflowed = passed.totals.overflowed();
        if overflowed {
            drop(passed);
            self.cx.expert_rank_capacity = None;
            self.cx.stats = fresh_stats(&self.stages, &self.cx.device)?;
            passed = self.passes(step, first)?;
        }
        self.end_trace(step, first)?;
        self.cx.batches.clear();

        let Passed { grads, norm, totals } = passed;
        let norm = norm.wait(&self.cx.device)?;
        let mut report = totals.report(&self.setup, self.cx.objective, step, total_weight, norm.0);
        report.reruns = u64::from(overflowed);
        report.updated = report.is_finite() && total_weight > 0.0;
        if report.updated {
            let scale = norm.clip_factor(self.setup.clip_grad);
            self.optimizer.update(&mut self.cx, grads, report.lr, scale)?;
            if !self.setup.overlap_param_gather {
                self.cx.params.await_all_weights()?;
            }
            self.update_expert_biases(&totals)?;
        }
        Ok(report)
    }

    /// Forward and backward of all micro-batches of a step whose first sequence has the index `first`. A device computes the norm of
    /// the gradient while the host reads what routers saw. Collective.
    fn passes(&mut self, step: u64, first: u64) -> Result<Passed<T, D>> {
        self.start_trace(step, first)?;
        self.count_step()?;
        self.cx.params.zero_grads(self.setup.overlap_grad_reduce);
        execute(&self.program, self.pipeline_rank(), &self.stages, &mut self.transport, &mut self.cx)?;
        let grads = reduce_gradients(&mut self.cx)?;
        let norm = PendingGradNorm::start(&self.cx, &grads, &self.names)?;
        Ok(Passed { grads, norm, totals: Totals::reduce(&self.cx, &self.setup, self.rank)? })
    }

    /// Reads the choices of a step, where they are replayed, and starts to note them, where they are recorded.
    fn start_trace(&mut self, step: u64, first: u64) -> Result<()> {
        if let Some(root) = &self.setup.replay_routing {
            let trace = StepTrace { setup: &self.setup, rank: self.rank, step, first };
            self.cx.replay = Some(trace.replay(root, self.cx.stats.moe.layers(), &self.cx)?);
        }
        self.cx.recorded = self.setup.record_routing.is_some().then(Recorded::new);
        Ok(())
    }

    /// Writes the choices of a step, where they are recorded.
    fn end_trace(&mut self, step: u64, first: u64) -> Result<()> {
        self.cx.replay = None;
        if let (Some(root), Some(recorded)) = (&self.setup.record_routing, self.cx.recorded.take()) {
            let trace = StepTrace { setup: &self.setup, rank: self.rank, step, first };
            trace.record(root, &recorded, &self.cx)?;
        }
        Ok(())
    }

    /// Moves the biases of this rank's routers by what all ranks counted.
    fn update_expert_biases(&mut self, totals: &Totals) -> Result<()> {
        let rate = self.setup.expert_bias_update_rate;
        for (layer, bias) in self.stages.iter().flat_map(|stage| stage.expert_biases()) {
            let counts = totals.expert_counts(&self.setup, layer);
            bias.update(&counts, rate, &mut self.cx.params, &self.cx.device)?;
        }
        Ok(())
    }

    /// Mean loss over `micro_batches` micro-batches of held-out sequences (a multiple of DP; fill up with sequences of
    /// padding). Changes no state. Collective.
    pub fn evaluate(
        &mut self,
        micro_batches: usize,
        micro_batch: impl Fn(usize) -> Result<Vec<Sequence>>,
    ) -> Result<Option<f64>> {
        let per_rank = micro_batches / self.setup.folding.size(Attention::DP);
        self.cx.mode = Mode::Evaluate;
        let total_weight = self.load(per_rank, 0, micro_batch)?;
        let program = self.setup.evaluation_program(per_rank)?;
        execute(&program, self.pipeline_rank(), &self.stages, &mut self.transport, &mut self.cx)?;
        self.cx.batches.clear();
        let totals = Totals::reduce(&self.cx, &self.setup, self.rank)?;
        Ok((total_weight > 0.0).then(|| totals.loss_sum() / total_weight))
    }

    /// Prepares steps of `sequences` sequences.
    fn set_batch_size(&mut self, sequences: usize) -> Result<()> {
        if sequences != self.cx.objective.sequences {
            self.program = self.setup.training_program(sequences)?;
            self.cx.objective = self.setup.objective(sequences);
        }
        Ok(())
    }

    /// Counts the choices of the whole step by forward passes of their own, where a load-balancing loss needs them before the
    /// first backward pass and this rank has several micro-batches. Leaves fresh statistics.
    fn count_step(&mut self) -> Result<()> {
        self.cx.step_counts.clear();
        let micro_batches = self.cx.batches.len();
        if self.setup.model.aux_loss_coef(AuxLossScope::Global) == 0.0 || micro_batches == 1 {
            return Ok(());
        }
        let program = self.setup.evaluation_program(micro_batches)?;
        let stages: Vec<_> = self.stages.iter().map(|stage| CountingStage::new(stage)).collect();
        execute(&program, self.pipeline_rank(), &stages, &mut self.transport, &mut self.cx)?;

        let fresh = fresh_stats(&self.stages, &self.cx.device)?;
        let Stats { moe: counted, overflowed, .. } = std::mem::replace(&mut self.cx.stats, fresh);
        self.cx.stats.overflowed = overflowed;
        let counted = counted.read(&self.cx.device)?;
        let own: Vec<i64> = counted.values().flat_map(|stats| stats.plain_counts.iter().copied()).collect();
        let sums = self.cx.comms.group(TP_CP_DP)?.all_reduce_host(&own, Reduction::Sum)?;
        let experts = self.setup.model.num_local_experts;
        let sums =
            sums.chunks_exact(experts).map(|sums| Tensor::from_slice(&self.cx.device, 1, experts, sums));
        let sums = sums.collect::<moe_kernels::Result<Vec<_>>>()?;
        self.cx.step_counts = counted.into_keys().zip(sums).collect();
        Ok(())
    }

    fn pipeline_rank(&self) -> u32 {
        self.setup.folding.stage(self.rank) as u32
    }

    /// Puts this rank's part of its `count` micro-batches on the device and resets the statistics; returns the sum of loss
    /// weights over the whole step, whose first sequence has the index `first`.
    fn load(
        &mut self,
        count: usize,
        first: u64,
        micro_batch: impl Fn(usize) -> Result<Vec<Sequence>>,
    ) -> Result<f64> {
        let folding = &self.setup.folding;
        let (dp, d) = (folding.size(Attention::DP), folding.coordinate(self.rank, Attention::DP));
        let host = (0..count)
            .map(|j| {
                let u = j * dp + d;
                let first = first + (u * self.setup.micro_batch_size) as u64;
                HostBatch::new(&micro_batch(u)?, first, folding, self.rank)
            })
            .collect::<Result<Vec<_>>>()?;
        let own: f64 = host.iter().map(HostBatch::total_weight).sum();
        let valid: usize = host.iter().map(HostBatch::valid_tokens).sum();
        let sums = self.cx.comms.group(CP_DP)?.all_reduce_host(&[own, valid as f64], Reduction::Sum)?;
        let total = sums[0];
        // A sum of integers below 2^53 is exact.
        self.cx.objective.tokens = sums[1] as usize;
        let upload = |batch: &HostBatch| batch.upload(&self.cx.device, total, folding, self.rank);
        self.cx.batches = host.iter().map(upload).collect::<Result<_>>()?;
        self.cx.stats = fresh_stats(&self.stages, &self.cx.device)?;
        Ok(total)
    }
}

/// The layers and parameters of one rank.
fn build(setup: &Setup, rank: usize) -> Result<(Vec<DecoderStage>, ParamLayout)> {
    let mut params = ParamLayoutBuilder::new(&setup.folding, rank);
    let &Setup { dispatcher, recompute, moe_shared_expert_overlap: shared_expert_overlap, .. } = setup;
    let execution = Execution { dispatcher, recompute, shared_expert_overlap };
    let mut stages = DecoderStage::of_rank(&mut params, &setup.model, execution, &setup.pipeline)?;
    if setup.schedule.has_overlaps() {
        DecoderStage::weave(&mut stages)?;
    }
    Ok((stages, params.build()))
}
