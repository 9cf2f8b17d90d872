//! From `[parallel]` to a folding and stages.

use moe_model::PipelineLayout;
use moe_model::config::ModelConfig;
use moe_topology::{Attention, Constraints, Expert, Folding, Mapping};

use super::{ConfigError, ParallelConfig, require};

impl ParallelConfig {
    /// The sizes of the axes, as written.
    ///
    /// # Errors
    /// `order` does not name axes.
    pub fn mapping(&self) -> Result<Mapping, ConfigError> {
        let &ParallelConfig { world_size, tp, cp, pp, ep, etp, .. } = self;
        let order = self.order.parse()?;
        Ok(Mapping { world_size, tp, cp, pp, ep, etp, order, ..Mapping::default() })
    }

    /// What `model` asks of the mapping; fields of the batch are left open.
    pub fn constraints(&self, model: &ModelConfig) -> Constraints {
        // Listed stages are checked by themselves: the first and the last may have no layer.
        let even = self.layers_per_stage.is_none() && self.pipeline_layout.is_none();
        let model = model.constraints();
        Constraints {
            vpp: self.vpp,
            num_hidden_layers: model.num_hidden_layers.filter(|_| even),
            cp_ulysses: self.cp_ulysses,
            ..model
        }
    }

    /// The least that must divide the length of sequences.
    pub fn sequence_multiple(&self) -> usize {
        match (self.cp, self.tp) {
            (1, tp) => tp,
            // A rank of CP has two chunks, which together are cut over TP.
            (cp, tp) if tp.is_multiple_of(2) => cp * tp,
            (cp, tp) => cp * tp * 2,
        }
    }

    /// The folding, legal under `constraints`, its TP split as [`ModelConfig::split_tp`] does, and its CP in Ulysses (the
    /// inner digit) and ring.
    ///
    /// # Errors
    /// The equation that is broken, the values and the nearest legal mappings; or the ring of a model with a window.
    pub fn folding(&self, model: &ModelConfig, constraints: Constraints) -> Result<Folding, ConfigError> {
        let &ParallelConfig { cp, cp_ulysses: ulysses, .. } = self;
        if let Some(window) = model.sliding_window.filter(|_| cp != ulysses) {
            let setting = format!(
                "model.sliding_window = {window} with parallel.cp = {cp} and parallel.cp_ulysses = {ulysses}"
            );
            let fix = "set parallel.cp_ulysses to parallel.cp (all-to-all alone), or leave the window out";
            return Err(ConfigError::Unsupported { setting, fix });
        }
        let mapping = self.mapping()?;
        let whole = constraints.fold(mapping.clone())?;
        let split = model.split_tp(mapping).split(Attention::CP_INNER, ulysses);
        match self.instances(&whole)? {
            1 => Ok(constraints.fold(split)?),
            instances => Ok(constraints.fold(split.optimizer_instances(instances))?),
        }
    }

    /// The instances of the distributed optimizer, if the replicas can be cut so.
    fn instances(&self, folding: &Folding) -> Result<usize, ConfigError> {
        let instances = self.num_distributed_optimizer_instances;
        let (dp, edp) = (folding.size(Attention::DP), folding.size(Expert::EDP));
        let legal: Vec<String> =
            (1..=dp).filter(|n| dp % n == 0 && edp % n == 0).map(|n| n.to_string()).collect();
        let holds = legal.contains(&instances.to_string());
        let allowed = format!("a common divisor of dp = {dp} and edp = {edp}: {}", legal.join(", "));
        require("parallel.num_distributed_optimizer_instances", instances, holds, &allowed)?;
        Ok(instances)
    }

    /// Which of `layers` layers are on which pipeline rank: where the schedule has its stages.
    ///
    /// # Errors
    /// `layers_per_stage` or `pipeline_layout` does not fit, or both are given; or those of [`schedule`](Self::schedule).
    pub fn pipeline(&self, layers: usize) -> Result<PipelineLayout, ConfigError> {
        let placement = self.schedule()?.placement(self.pp as u32, self.vpp as u32)?;
        self.stages(layers)?.placed(placement).map_err(ConfigError::Layers)
    }

    /// The layers of each stage.
    fn stages(&self, layers: usize) -> Result<PipelineLayout, ConfigError> {
        let ParallelConfig { pp, vpp, layers_per_stage, pipeline_layout, .. } = self;
        if let Some(text) = pipeline_layout {
            let setting = "parallel.pipeline_layout";
            if let Some(list) = layers_per_stage {
                let other = format!("parallel.layers_per_stage = {list:?}");
                let (problem, fix) = ("says the same", "leave one of them out".to_owned());
                return Err(ConfigError::Conflict { setting, problem, other, fix });
            }
            let layout = PipelineLayout::parse(layers, *pp, text).map_err(ConfigError::PipelineLayout)?;
            let stages = layout.stages();
            let allowed = format!(
                "a layout of pp·vpp = {} stages, not of {stages} (parallel.vpp = {})",
                pp * vpp,
                layout.virtual_stages()
            );
            require(setting, format!("{text:?}"), stages == pp * vpp, &allowed)?;
            return Ok(layout);
        }
        match layers_per_stage {
            None => PipelineLayout::even(layers, *pp, *vpp),
            Some(list) if list.len() != pp * vpp => {
                let (value, allowed) =
                    (format!("{list:?}"), format!("a list of pp·vpp = {} numbers", pp * vpp));
                return Err(ConfigError::Range { setting: "parallel.layers_per_stage", value, allowed });
            }
            Some(list) => PipelineLayout::new(layers, *pp, list),
        }
        .map_err(ConfigError::Layers)
    }
}
