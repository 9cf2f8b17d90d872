//! Orders as text: steps separated by commas.

use std::fmt;
use std::str::FromStr;

use super::node::{Layer, Node, Part, Phase, Step};
use super::order::Order;
use crate::{Error, Result};

fn step(text: &str) -> Option<Step> {
    let letter = text.find(|c: char| !c.is_ascii_digit())?;
    let (layer, rest) = text.split_at(letter);
    let (phase, name) = rest.split_once('_')?;
    let phase = Phase::ALL.into_iter().find(|(letter, _)| phase.chars().eq([*letter]))?.1;
    let (waits, name) = name.strip_prefix("WAIT_").map_or((false, name), |name| (true, name));
    let part = Part::ALL.into_iter().find(|(part, _)| *part == name)?.1;
    let node = Node::new(layer.parse().ok()?, phase, part);
    match (part.is_all_to_all(), waits) {
        (true, true) => Some(Step::Wait(node)),
        (true, false) => Some(Step::Start(node)),
        (false, false) => Some(Step::Compute(node)),
        (false, true) => None,
    }
}

impl FromStr for Step {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        step(text).ok_or_else(|| Error::NotAStep { text: text.to_owned() })
    }
}

/// The layers of one pass, as its steps name them: a layer is what its first step says, and dense where none does.
fn layers(steps: &[Step], forward: bool) -> Vec<Layer> {
    let of_pass = |step: &&Step| (step.node().phase == Phase::Forward) == forward;
    let own = || steps.iter().filter(of_pass).map(|step| step.node());
    // Each layer has a step, so no number may be beyond them; whoever names one is told that it is unknown.
    let count = own().map(|node| node.layer.saturating_add(1) as usize).max().unwrap_or(0).min(steps.len());
    let mut layers = vec![Layer::Dense; count];
    for node in own().filter(|node| node.part != Part::Dense) {
        if let Some(layer) = layers.get_mut(node.layer as usize) {
            *layer = Layer::Moe;
        }
    }
    layers
}

impl FromStr for Order {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) writes, and checks it as [`Order::new`] does.
    fn from_str(text: &str) -> Result<Self> {
        let fields = text.split(',').map(str::trim).filter(|field| !field.is_empty());
        let steps = fields.map(str::parse).collect::<Result<Vec<Step>>>()?;
        Order::new(layers(&steps, true), layers(&steps, false), steps)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.steps().iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{step}")?;
        }
        Ok(())
    }
}
