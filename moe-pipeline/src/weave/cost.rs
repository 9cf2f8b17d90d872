//! What the nodes of a layer cost.

use super::node::{Layer, Node, Part, Phase};
use crate::{Error, Result, StageCost};

/// What one micro-batch costs in one layer. Any unit of time, the same everywhere; the same on all ranks of an expert group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LayerCost {
    /// A dense layer.
    Dense(StageCost),
    /// A layer of experts.
    Moe {
        /// Attention and router.
        attention: StageCost,
        /// The experts.
        experts: StageCost,
        /// Each all-to-all: dispatch, combine, and the gradients of both.
        all_to_all: f64,
    },
}

impl LayerCost {
    /// What the layer is made of.
    pub fn layer(&self) -> Layer {
        match self {
            LayerCost::Dense(_) => Layer::Dense,
            LayerCost::Moe { .. } => Layer::Moe,
        }
    }

    /// What the layer's passes take if each all-to-all is waited for at once.
    pub fn alone(&self) -> StageCost {
        match *self {
            LayerCost::Dense(cost) => cost,
            LayerCost::Moe { attention, experts, all_to_all } => StageCost {
                forward: attention.forward + experts.forward + 2.0 * all_to_all,
                backward_input: attention.backward_input + experts.backward_input + 2.0 * all_to_all,
                backward_weight: attention.backward_weight + experts.backward_weight,
            },
        }
    }

    /// What its two all-to-alls of one direction take.
    pub(crate) fn all_to_alls(&self) -> f64 {
        match self {
            LayerCost::Dense(_) => 0.0,
            LayerCost::Moe { all_to_all, .. } => 2.0 * all_to_all,
        }
    }

    /// Time of a node of this layer.
    pub(super) fn time(&self, node: Node) -> f64 {
        let (dense, moe_attention, moe_experts, all_to_all) = match *self {
            LayerCost::Dense(cost) => (cost, cost, cost, 0.0),
            LayerCost::Moe { attention, experts, all_to_all } => (attention, attention, experts, all_to_all),
        };
        let cost = match node.part {
            Part::Dispatch | Part::Combine => return all_to_all,
            Part::Dense => dense,
            Part::Attention => moe_attention,
            Part::Experts => moe_experts,
        };
        match node.phase {
            Phase::Forward => cost.forward,
            Phase::InputGradient => cost.backward_input,
            Phase::WeightGradient => cost.backward_weight,
        }
    }
}

/// Checks costs of layers.
pub(crate) fn check(layers: &[LayerCost]) -> Result<()> {
    let values = |cost: &LayerCost| {
        let three = |c: StageCost| [c.forward, c.backward_input, c.backward_weight];
        match *cost {
            LayerCost::Dense(cost) => three(cost).to_vec(),
            LayerCost::Moe { attention, experts, all_to_all } => {
                [&three(attention)[..], &three(experts), &[all_to_all]].concat()
            }
        }
    };
    let all = layers.iter().map(values).enumerate();
    let mut all = all.flat_map(|(index, values)| values.into_iter().map(move |value| (index, value)));
    match all.find(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
        Some((index, value)) => Err(Error::Cost { what: "layer", index, value }),
        None => Ok(()),
    }
}
