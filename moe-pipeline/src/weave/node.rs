//! What a pass does in a layer.

use std::fmt;

/// What a layer is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layer {
    /// One node per phase; nothing is exchanged.
    Dense,
    /// Attention, dispatch, experts, combine.
    Moe,
}

/// Which part of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// `F`: of the forward pass.
    Forward,
    /// `I`: the gradient of the input, of the backward pass.
    InputGradient,
    /// `W`: the gradient of the weights, of the backward pass.
    WeightGradient,
}

/// Which part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// All of a dense layer.
    Dense,
    /// All of a layer of experts that comes before dispatch: attention, norms, the router, and the exchange of the counts of
    /// rows, which is waited for.
    Attention,
    /// The all-to-all that brings tokens to their experts; its gradient brings gradients back.
    Dispatch,
    /// The experts.
    Experts,
    /// The all-to-all that brings results to their tokens; its gradient brings gradients to the experts.
    Combine,
}

impl Part {
    /// Whether it is an all-to-all, which is started and waited for.
    pub const fn is_all_to_all(self) -> bool {
        matches!(self, Part::Dispatch | Part::Combine)
    }
}

/// One part of one layer in one phase: the second level's unit of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// Position among the layers of its pass, from 0 at the pipeline's beginning.
    pub layer: u32,
    /// Of which pass, and for which gradient.
    pub phase: Phase,
    /// Of the layer.
    pub part: Part,
}

impl Node {
    /// A node.
    pub const fn new(layer: u32, phase: Phase, part: Part) -> Self {
        Node { layer, phase, part }
    }
}

/// What is done at once. Written `3F_ATTENTION`; an all-to-all is started by `3F_DISPATCH` and ended by `3F_WAIT_DISPATCH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Computes a node that is no all-to-all.
    Compute(Node),
    /// Starts an all-to-all.
    Start(Node),
    /// Waits for it.
    Wait(Node),
}

impl Step {
    /// The node that it is a step of.
    pub const fn node(self) -> Node {
        match self {
            Step::Compute(node) | Step::Start(node) | Step::Wait(node) => node,
        }
    }

    /// The steps of a node, in order.
    pub(super) fn of(node: Node) -> impl Iterator<Item = Step> {
        let (first, second) = match node.part.is_all_to_all() {
            true => (Step::Start(node), Some(Step::Wait(node))),
            false => (Step::Compute(node), None),
        };
        std::iter::once(first).chain(second)
    }
}

/// The nodes of a forward pass, each needing the one before it.
pub(super) fn forward(layers: &[Layer]) -> Vec<Node> {
    let parts = |layer: &Layer| match layer {
        Layer::Dense => &[Part::Dense][..],
        Layer::Moe => &[Part::Attention, Part::Dispatch, Part::Experts, Part::Combine],
    };
    let of_layer = |(at, layer)| parts(layer).iter().map(move |&part| Node::new(at, Phase::Forward, part));
    (0..).zip(layers).flat_map(of_layer).collect()
}

/// The input gradients of a backward pass, each needing the one before it: those of the forward pass from its end.
pub(super) fn input_gradients(layers: &[Layer]) -> Vec<Node> {
    let gradient = |node| Node { phase: Phase::InputGradient, ..node };
    forward(layers).into_iter().rev().map(gradient).collect()
}

/// The weight gradient that becomes possible by an input gradient.
pub(super) fn weight_gradient(input: Node) -> Option<Node> {
    (!input.part.is_all_to_all()).then_some(Node { phase: Phase::WeightGradient, ..input })
}

impl Phase {
    pub(super) const ALL: [(char, Phase); 3] =
        [('F', Phase::Forward), ('I', Phase::InputGradient), ('W', Phase::WeightGradient)];
}

impl Part {
    pub(super) const ALL: [(&'static str, Part); 5] = [
        ("DENSE", Part::Dense),
        ("ATTENTION", Part::Attention),
        ("DISPATCH", Part::Dispatch),
        ("EXPERTS", Part::Experts),
        ("COMBINE", Part::Combine),
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Node { layer, phase, part } = self.node();
        let letter = Phase::ALL[phase as usize].0;
        let wait = if matches!(self, Step::Wait(_)) { "WAIT_" } else { "" };
        write!(f, "{layer}{letter}_{wait}{}", Part::ALL[part as usize].0)
    }
}
