//! What a rank lends to its layers.

use std::collections::BTreeMap;

use moe_comm::{Comm, Comms};
use moe_dispatch::{ModelUnit, RouterStats, RouterSum, RouterSums};
use moe_kernels::{Device, Float, Tensor};
use moe_topology::{Axes, View};

use crate::capacity::ExpertCapacity;
use crate::context::Documents;
use crate::forced::ForcedRouting;
use crate::loss::LossSum;
use crate::params::{ParamStore, Segment};
use crate::rope::RopeTable;
use crate::{Error, Result};

/// A rank's context, lent to every call: layers hold no tensors, so nothing borrowed outlives an action.
pub struct Cx<T: Float, D: Device> {
    /// Memory and kernels.
    pub device: D,
    /// Communicators of the groups that layers use.
    pub comms: Comms<D>,
    /// Weights and gradients.
    pub params: ParamStore<T, D>,
    /// Angles of the rotary position embedding.
    pub rope: RopeTable<T, D>,
    /// What the passes are for.
    pub mode: Mode,
    /// What experts take of a micro-batch in training; all there is unless given.
    pub capacity: Option<ExpertCapacity>,
    /// Rows that an expert-parallel rank may receive of a micro-batch in training, in multiples of what it would if all
    /// experts were chosen equally often (`moe_expert_rank_capacity_factor`); any number unless given. Where a rank would
    /// receive more, nothing is routed and [`Stats::overflowed`] is set: the step is to be made again without.
    pub expert_rank_capacity: Option<f64>,
    /// A load that training is given instead of what routers choose; none unless given.
    pub forced_routing: Option<ForcedRouting>,
    /// Choices that routers are given instead of making them, by micro-batch and layer; none unless given.
    pub replay: Option<Choices>,
    /// What routers chose, where it is to be known.
    pub recorded: Option<Recorded>,
    /// The rank's micro-batches of this step, in order.
    pub batches: Vec<MicroBatch<T, D>>,
    /// The step's constants in the objective.
    pub objective: Objective,
    /// Choices that the load-balancing loss of the whole step counts, `[1, experts]` by layer, over all micro-batches and all
    /// ranks of the stage; empty where every rank has one micro-batch, whose layers add up their own.
    pub step_counts: BTreeMap<usize, Tensor<i64, D>>,
    /// Choices that the load-balancing loss over all layers counts, `[1, experts]`, of the micro-batch whose pass is being
    /// made: in a forward pass of the layers so far, in a backward pass of all layers. None without that loss.
    pub choices: Option<Tensor<i64, D>>,
    /// What that loss takes together: [`Step`](ModelUnit::Step) asks for one micro-batch on every rank.
    pub model_unit: ModelUnit,
    /// This rank's blocks of the logits by micro-batch, `[positions · sequences, vocab block]`, where they are to be known
    /// beside the loss (last stage only).
    pub logits: Option<BTreeMap<u32, Tensor<T, D>>>,
    /// What the passes of this step saw.
    pub stats: Stats<D>,
}

impl<T: Float, D: Device> Cx<T, D> {
    /// A context without micro-batches, to evaluate.
    pub fn new(
        device: D,
        comms: Comms<D>,
        params: ParamStore<T, D>,
        rope: RopeTable<T, D>,
        objective: Objective,
    ) -> Self {
        let (mode, capacity, batches, stats) = (Mode::Evaluate, None, Vec::new(), Stats::default());
        let (expert_rank_capacity, forced_routing) = (None, None);
        Cx {
            device,
            comms,
            params,
            rope,
            mode,
            capacity,
            expert_rank_capacity,
            forced_routing,
            replay: None,
            recorded: None,
            batches,
            objective,
            step_counts: BTreeMap::new(),
            choices: None,
            model_unit: ModelUnit::default(),
            logits: None,
            stats,
        }
    }

    /// A group of the attention or expert view that was created with the context's communicators.
    pub fn group<V: View>(&self, axes: Axes<V>) -> Result<Comm<'_, V, D>> {
        Ok(self.comms.group(axes)?)
    }

    /// Micro-batch `m` of this step.
    pub fn batch(&self, m: u32) -> Result<&MicroBatch<T, D>> {
        self.batches.get(m as usize).ok_or(Error::NoBatch { index: m as usize, batches: self.batches.len() })
    }

    /// Says that all weight gradients that a segment of the parameters gets from micro-batch `m` were added. After the
    /// last micro-batch, buckets that nothing more is added to may be reduced.
    pub fn grads_added(&mut self, segment: Segment, m: u32) -> Result<()> {
        match m as usize + 1 == self.batches.len() {
            true => self.params.grads_complete(segment, &self.comms),
            false => Ok(()),
        }
    }
}

/// The experts of this rank's tokens, `tokens · K` in the order of rows, by micro-batch of the rank and layer: before dropping.
pub type Choices = BTreeMap<(u32, usize), Vec<i32>>;

/// Choices that routers made, by micro-batch of the rank and layer.
pub type Recorded = BTreeMap<(u32, usize), RecordedRouting>;

/// What a router chose for this rank's tokens of a micro-batch, in the order of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedRouting {
    /// `tokens · K`, before dropping: as in [`Choices`].
    pub experts: Vec<i32>,
    /// `tokens · K`: the weights of these experts.
    pub weights: Vec<f64>,
    /// `tokens`: by how much each choice [stands](moe_dispatch::Margins).
    pub margins: Vec<f64>,
}

/// What passes are for: some of what a model does is for training alone, and its random choices are keyed by the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A step of training.
    Train {
        /// Seed of the run.
        seed: u64,
        /// The step, from 1.
        step: u64,
    },
    /// Evaluation or inference: nothing random, no state changes.
    Evaluate,
}

/// Constants of the objective, the same on all ranks: `J = (1/N) Σ w·ce + Σ_l (c_aux·A_l + c_z·Z_l)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Micro-batches of the step over all ranks: units of the auxiliary loss.
    pub micro_batches: usize,
    /// Sequences of the step over all ranks: units of the auxiliary loss of each sequence.
    pub sequences: usize,
    /// Valid tokens of the step over all ranks.
    pub tokens: usize,
}

/// Sequences that go through the pipeline together, the part of this context-parallel rank
/// ([`positions`](crate::context::positions)), sequence-major: the `s`-th of its tokens of sequence `b` is row
/// `s · batch + b`.
#[derive(Debug)]
pub struct MicroBatch<T: Float, D: Device> {
    /// Sequences.
    pub batch: usize,
    /// Index of the first one among all sequences of the run, g of docs/semantics.md (of the evaluation, where there is
    /// no step); those of a micro-batch follow each other. The same under any mapping.
    pub first_sequence: u64,
    /// Positions of each sequence on this context-parallel rank.
    pub seq_len: usize,
    /// Input tokens, `[1, seq_len · batch]`.
    pub ids: Tensor<i32, D>,
    /// Position of each token in its sequence, `[1, seq_len · batch]`.
    pub positions: Tensor<i32, D>,
    /// 0 for padding, `[1, seq_len · batch]`; all tokens are valid if there is none.
    pub valid: Option<Tensor<i32, D>>,
    /// Where the documents of the sequences lie, if they are separated.
    pub documents: Option<Documents<D>>,
    /// Targets, `[1, seq_len · batch]`.
    pub labels: Tensor<i32, D>,
    /// Loss weights `w`, `[1, seq_len · batch]`.
    pub weights: Tensor<T::Acc, D>,
    /// Derivative of the objective by each token's loss, `w / N`, `[1, seq_len · batch]`.
    pub scale: Tensor<T::Acc, D>,
}

impl<T: Float, D: Device> MicroBatch<T, D> {
    /// From host vectors in sequence-major order, with 0 as the index of the first sequence, without padding and separated documents.
    /// `total_weight` is N, the sum of all loss weights of the step (with N = 0 the gradient of the loss is 0).
    pub fn new(
        device: &D,
        batch: usize,
        ids: &[i32],
        positions: &[i32],
        labels: &[i32],
        weights: &[f64],
        total_weight: f64,
    ) -> Result<Self> {
        let rows = ids.len();
        let scale: Vec<f64> =
            weights.iter().map(|w| if total_weight > 0.0 { w / total_weight } else { 0.0 }).collect();
        Ok(MicroBatch {
            batch,
            first_sequence: 0,
            seq_len: rows / batch.max(1),
            ids: Tensor::from_slice(device, 1, rows, ids)?,
            positions: Tensor::from_slice(device, 1, rows, positions)?,
            valid: None,
            documents: None,
            labels: Tensor::from_slice(device, 1, rows, labels)?,
            weights: Tensor::from_f64(device, 1, rows, weights)?,
            scale: Tensor::from_f64(device, 1, rows, &scale)?,
        })
    }

    /// Position of each token where rotations count from, `[1, seq_len · batch]`: in its document if documents are separated,
    /// else in its sequence.
    pub fn rotary_positions(&self) -> &Tensor<i32, D> {
        self.documents.as_ref().map_or(&self.positions, |documents| &documents.positions)
    }
}

/// Sums over the forward passes of one step on this rank.
#[derive(Debug)]
pub struct Stats<D: Device> {
    /// Σ w·ce over this rank's tokens (last stage only; equal on all tensor-parallel ranks).
    pub loss: LossSum<D>,
    /// What the MoE layers of this stage saw.
    pub moe: MoeStats<D>,
    /// Whether experts would have received more rows than [`Cx::expert_rank_capacity`] allows: on any rank of the group, and
    /// all else is worth nothing.
    pub overflowed: bool,
}

impl<D: Device> Default for Stats<D> {
    fn default() -> Self {
        Stats { loss: LossSum::default(), moe: MoeStats::default(), overflowed: false }
    }
}

/// What the routers of some layers saw in a step, on this rank: added up on the device, where passes do not wait for it.
#[derive(Debug)]
pub struct MoeStats<D: Device> {
    layers: Vec<usize>,
    /// A row for each of the layers; nothing of none.
    sums: Option<RouterSums<D>>,
}

impl<D: Device> Default for MoeStats<D> {
    /// Of no layer.
    fn default() -> Self {
        MoeStats { layers: Vec::new(), sums: None }
    }
}

impl<D: Device> MoeStats<D> {
    /// Of layers with these global indices, which have as many experts; of nothing yet.
    pub fn new(device: &D, layers: Vec<usize>, num_experts: usize) -> Result<Self> {
        let sums = (!layers.is_empty()).then(|| RouterSums::zeros(device, layers.len(), num_experts));
        Ok(MoeStats { layers, sums: sums.transpose()? })
    }

    /// The global indices of the layers.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// The sums of a layer, if it is one of these.
    pub(crate) fn of(&mut self, layer: usize) -> Result<Option<RouterSum<'_, D>>> {
        let row = self.layers.iter().position(|&l| l == layer);
        let (Some(row), Some(sums)) = (row, &mut self.sums) else { return Ok(None) };
        Ok(Some(sums.of(row)?))
    }

    /// What they are by now, by layer. Waits for the device, once.
    ///
    /// # Errors
    /// What the device found until then.
    pub fn read(&self, device: &D) -> Result<BTreeMap<usize, RouterStats>> {
        let Some(sums) = &self.sums else { return Ok(BTreeMap::new()) };
        Ok(self.layers.iter().copied().zip(sums.read(device)?).collect())
    }
}
