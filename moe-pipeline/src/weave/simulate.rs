//! What an order takes.

use std::collections::HashMap;

use super::cost::{LayerCost, check};
use super::node::{Node, Phase, Step};
use super::order::Order;
use crate::{Error, Result};

/// A node in time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeSpan {
    /// What was done.
    pub node: Node,
    /// When it began; the overlap begins at 0.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

/// An order in time.
#[derive(Debug, Clone, PartialEq)]
pub struct WovenTimeline {
    /// When all is done.
    pub makespan: f64,
    /// The compute lane.
    pub compute: Vec<NodeSpan>,
    /// The lane of all-to-alls.
    pub all_to_all: Vec<NodeSpan>,
}

impl WovenTimeline {
    /// For how long the compute lane waits for all-to-alls.
    pub fn exposed(&self) -> f64 {
        self.makespan - self.compute.iter().map(|span| span.end - span.start).sum::<f64>()
    }
}

impl Order {
    /// Runs the order on paper, on one compute lane and one lane of all-to-alls: an all-to-all begins when the compute lane comes to
    /// its start and those started before it have ended, and holds the compute lane up only where it is waited for. `forward` and
    /// `backward` are what the layers of the two passes cost.
    ///
    /// # Errors
    /// Costs of other layers than the order's, negative, or not finite.
    pub fn simulate(&self, forward: &[LayerCost], backward: &[LayerCost]) -> Result<WovenTimeline> {
        for (pass, costs, layers) in
            [("forward", forward, self.forward()), ("backward", backward, self.backward())]
        {
            check(costs)?;
            let (expected, got) = (layers.len(), costs.len());
            if expected != got {
                return Err(Error::CostCount { what: "layers", expected, got });
            }
            let mut kinds = layers.iter().copied().zip(costs).enumerate();
            if let Some((index, (expected, _))) = kinds.find(|(_, (layer, cost))| cost.layer() != *layer) {
                return Err(Error::LayerCost { pass, index, expected });
            }
        }
        let time = |node: Node| match node.phase {
            Phase::Forward => forward[node.layer as usize].time(node),
            Phase::InputGradient | Phase::WeightGradient => backward[node.layer as usize].time(node),
        };
        let (mut now, mut free) = (0.0_f64, 0.0_f64);
        let mut arrives = HashMap::new();
        let mut timeline = WovenTimeline { makespan: 0.0, compute: Vec::new(), all_to_all: Vec::new() };
        for &step in self.steps() {
            match step {
                Step::Compute(node) => {
                    let span = NodeSpan { node, start: now, end: now + time(node) };
                    timeline.compute.push(span);
                    now = span.end;
                }
                Step::Start(node) => {
                    let start = now.max(free);
                    let span = NodeSpan { node, start, end: start + time(node) };
                    timeline.all_to_all.push(span);
                    arrives.insert(node, span.end);
                    free = span.end;
                }
                Step::Wait(node) => now = arrives.get(&node).map_or(now, |&end| now.max(end)),
            }
        }
        timeline.makespan = now;
        Ok(timeline)
    }
}
