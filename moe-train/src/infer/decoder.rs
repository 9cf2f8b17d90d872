//! A whole model on one rank, token by token.

use moe_comm::World;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::axes::communicators;
use moe_model::params::ParamLayoutBuilder;
use moe_model::{Cx, DecoderStage, Execution, KvCache, MicroBatch, Objective, PipelineLayout, RopeTable};
use moe_topology::{Folding, Mapping};

use crate::checkpoint::{Weights, read_params};
use crate::{Error, Result};

/// Positions that go through the model together: what this costs in memory does not grow with the prompt.
const PREFILL: usize = 512;

/// A whole model on one rank, to run forward.
pub(super) struct Decoder<T: Float>
where
    Cpu: Backend<T>,
{
    stage: DecoderStage,
    cx: Cx<T, Cpu>,
    cache: KvCache<T, Cpu>,
}

impl<T: Float> Decoder<T>
where
    Cpu: Backend<T>,
{
    /// With room for `capacity` positions.
    pub fn open(world: &dyn World<Cpu>, weights: &Weights, capacity: usize) -> Result<Self> {
        let (model, device) = (weights.model(), Cpu::default());
        let folding = Folding::new(Mapping::default())?;
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
        let stages = DecoderStage::of_rank(&mut layout, model, Execution::default(), &whole)?;
        let stage = stages.into_iter().next().ok_or(Error::Protocol { what: "a model without a stage" })?;
        let params = read_params(layout.build(), weights, &device)?;
        let comms = communicators::<Cpu>().build(world, &device, &folding)?;
        let rope = RopeTable::of(&device, model, capacity)?;
        let objective = Objective { micro_batches: 1, sequences: 1, tokens: 1 };
        let cache = stage.cache(&device, 1, capacity)?;
        Ok(Decoder { stage, cx: Cx::new(device, comms, params, rope, objective), cache })
    }

    /// The logits after the last of `tokens`, which follow those seen before; of tokens beyond the capacity, see
    /// [`generate`](super::generate).
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        let mut logits = Vec::new();
        for part in tokens.chunks(PREFILL) {
            logits = self.step(part)?;
        }
        Ok(logits)
    }

    /// Positions that are seen.
    pub fn len(&self) -> usize {
        self.cache.len()
    }

    /// Forgets what was seen.
    pub fn clear(&mut self) {
        self.cache.truncate(0);
    }

    fn step(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        let (n, first) = (tokens.len(), self.cache.len() as i32);
        let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let positions: Vec<i32> = (first..first + n as i32).collect();
        let (labels, weights) = (vec![0; n], vec![0.0; n]);
        let device = &self.cx.device;
        self.cx.batches = vec![MicroBatch::new(device, 1, &ids, &positions, &labels, &weights, 0.0)?];
        let y = self.stage.extend(0, None, &mut self.cache, 1, &mut self.cx)?;
        Ok(y.x.to_f64(&self.cx.device)?)
    }
}
