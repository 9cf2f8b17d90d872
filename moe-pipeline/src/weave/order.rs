//! An order in which the two passes of an overlap run.

use std::collections::{HashMap, HashSet};

use super::node::{Layer, Node, Phase, Step, forward, input_gradients, weight_gradient};
use crate::{Error, Result};

/// The steps of a forward pass and of a backward pass in one list, which was found to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    forward: Vec<Layer>,
    backward: Vec<Layer>,
    steps: Vec<Step>,
}

impl Order {
    /// Checks that each step of a forward pass through the layers `forward` and of a backward pass through the layers `backward` is in
    /// `steps` exactly once, and after what it needs: the node before it in its pass, from its compute or its wait; a wait after
    /// its start; a weight gradient after the input gradient of its node. Either pass may have no layers.
    ///
    /// # Errors
    /// The first step that breaks a rule, or one that is missing.
    pub fn new(forward: Vec<Layer>, backward: Vec<Layer>, steps: Vec<Step>) -> Result<Self> {
        let needs = needs(&forward, &backward);
        let mut seen = HashSet::with_capacity(needs.len());
        for (index, &step) in steps.iter().enumerate() {
            let Some(needed) = needs.get(&step) else { return Err(Error::UnknownStep { index, step }) };
            if let Some(needs) = needed.filter(|needed| !seen.contains(needed)) {
                return Err(Error::PrematureStep { index, step, needs });
            }
            if !seen.insert(step) {
                return Err(Error::DuplicateStep { index, step });
            }
        }
        let missing = all_steps(&forward, &backward).find(|step| !seen.contains(step));
        match missing {
            Some(step) => Err(Error::MissingStep { step }),
            None => Ok(Order { forward, backward, steps }),
        }
    }

    /// The steps, in the order in which they are done.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The layers of the forward pass.
    pub fn forward(&self) -> &[Layer] {
        &self.forward
    }

    /// The layers of the backward pass.
    pub fn backward(&self) -> &[Layer] {
        &self.backward
    }

    /// The most weight gradients that are put off at once: their input gradients are done, they are not. For each of them the
    /// backward pass keeps a node's inputs and the gradients of its outputs; one that adds each layer's weight gradients after its
    /// input gradients keeps those of one layer, 2 of a layer of experts.
    pub fn deferred(&self) -> usize {
        let (mut now, mut most) = (0_usize, 0);
        for step in &self.steps {
            match step {
                Step::Compute(Node { phase: Phase::InputGradient, .. }) => now += 1,
                // Not before its input gradient, as was checked.
                Step::Compute(Node { phase: Phase::WeightGradient, .. }) => now -= 1,
                _ => {}
            }
            most = most.max(now);
        }
        most
    }

    /// The all-to-alls in the order in which they are started: the same on all ranks of a group, as the whole list is.
    pub fn all_to_alls(&self) -> impl Iterator<Item = Node> {
        self.steps.iter().filter_map(|step| match step {
            Step::Start(node) => Some(*node),
            _ => None,
        })
    }
}

/// The nodes of both passes: the forward pass, the input gradients, the weight gradients as they become possible.
pub(super) fn nodes(layers: &[Layer], back: &[Layer]) -> [Vec<Node>; 3] {
    let inputs = input_gradients(back);
    let weights = inputs.iter().filter_map(|&input| weight_gradient(input)).collect();
    [forward(layers), inputs, weights]
}

fn all_steps(forward: &[Layer], backward: &[Layer]) -> impl Iterator<Item = Step> {
    nodes(forward, backward).into_iter().flatten().flat_map(Step::of)
}

/// Every step, and the one that must have been done before it.
fn needs(layers: &[Layer], back: &[Layer]) -> HashMap<Step, Option<Step>> {
    let mut needs = HashMap::new();
    let [forward, inputs, weights] = nodes(layers, back);
    for chain in [forward, inputs] {
        let mut before = None;
        for step in chain.into_iter().flat_map(Step::of) {
            needs.insert(step, before.replace(step));
        }
    }
    for weight in weights {
        let input = Node { phase: Phase::InputGradient, ..weight };
        needs.insert(Step::Compute(weight), Some(Step::Compute(input)));
    }
    needs
}
