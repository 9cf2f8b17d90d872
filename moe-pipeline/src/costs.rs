//! What passes and messages of a pipeline cost.

use std::collections::HashMap;

use crate::weave::{self, LayerCost};
use crate::{Action, Error, Kind, Placement, Result};

/// What one micro-batch costs on one stage. Any unit of time, the same everywhere.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StageCost {
    /// Time of `F`.
    pub forward: f64,
    /// Time of `I`.
    pub backward_input: f64,
    /// Time of `W`; `B` takes both.
    pub backward_weight: f64,
}

/// What one message costs between two neighbouring stages on different ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Time for which the message occupies the link: bytes / bandwidth. Messages between the same two ranks in the same
    /// direction queue up.
    pub transfer: f64,
    /// Time after that until it has arrived.
    pub latency: f64,
}

impl Link {
    /// A link that takes no time.
    pub const FREE: Link = Link { transfer: 0.0, latency: 0.0 };
}

/// Costs of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Per stage.
    pub stages: Vec<StageCost>,
    /// `links[s]` is between stages `s` and `s + 1`, in either direction: one fewer than stages. Unused where both are
    /// on one rank, or in different copies of the pipeline.
    pub links: Vec<Link>,
    /// What the passes of an overlap gain by being together.
    pub overlap: Overlap,
}

/// What an overlap costs.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Overlap {
    /// What part of its shorter pass hides behind the longer one, from 0 (the two take as long as one after the other) to 1 (as
    /// long as the longer one).
    Hidden(f64),
    /// What the [woven order](mod@crate::weave) of its layers takes.
    Woven(Woven),
}

/// What all-to-alls cost a pipeline's stages: in passes alone, where each is waited for at once, and in overlaps, woven.
#[derive(Debug, Clone, PartialEq)]
pub struct Woven {
    /// Per stage, how long its `F` waits, and its `I` as long.
    alone: Vec<f64>,
    /// By the stage of the `F` and that of the `B`.
    pairs: HashMap<(u32, u32), Took>,
}

/// What an action took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Took {
    pub(crate) time: f64,
    /// Of it, waiting for all-to-alls.
    pub(crate) exposed: f64,
}

impl Woven {
    /// Weaves the overlaps that a placement may have: of `F` of any stage of a rank with `B` of any. Stages of equal layers
    /// are woven once.
    fn new(placement: &Placement, layers: &[Vec<LayerCost>]) -> Result<Self> {
        let mut kinds: Vec<&[LayerCost]> = Vec::new();
        let mut of_stage = Vec::with_capacity(layers.len());
        for layers in layers.iter().map(Vec::as_slice) {
            let known = kinds.iter().position(|known| *known == layers);
            of_stage.push(known.unwrap_or(kinds.len()));
            if known.is_none() {
                kinds.push(layers);
            }
        }
        let mut of_kinds = HashMap::new();
        let mut pairs = HashMap::new();
        for rank in 0..placement.ranks() {
            let stages = placement.stages_of(rank);
            for (&f, &b) in stages.iter().flat_map(|f| stages.iter().map(move |b| (f, b))) {
                let key = (of_stage[f as usize], of_stage[b as usize]);
                let took = match of_kinds.get(&key) {
                    Some(&took) => took,
                    None => {
                        let (forward, backward) = (kinds[key.0], kinds[key.1]);
                        let woven = weave::weave(forward, backward)?.simulate(forward, backward)?;
                        let took = Took { time: woven.makespan, exposed: woven.exposed() };
                        of_kinds.insert(key, took);
                        took
                    }
                };
                pairs.insert((f, b), took);
            }
        }
        let waits = |layers: &Vec<LayerCost>| layers.iter().map(LayerCost::all_to_alls).sum();
        Ok(Woven { alone: layers.iter().map(waits).collect(), pairs })
    }
}

impl Costs {
    /// The same costs for all stages and links; overlaps gain nothing.
    pub fn uniform(stages: u32, stage: StageCost, link: Link) -> Self {
        let stages = stages as usize;
        Costs {
            stages: vec![stage; stages],
            links: vec![link; stages.saturating_sub(1)],
            overlap: Overlap::Hidden(0.0),
        }
    }

    /// The costs of stages of these layers, `layers[s]` being what those of stage `s` cost: a pass alone waits for each of
    /// its all-to-alls, an overlap is [woven](mod@crate::weave).
    ///
    /// # Errors
    /// Layers of another number of stages than the placement has; costs that are negative or not finite.
    pub fn of_layers(placement: &Placement, layers: &[Vec<LayerCost>], links: Vec<Link>) -> Result<Self> {
        let (expected, got) = (placement.stages() as usize, layers.len());
        if expected != got {
            return Err(Error::CostCount { what: "stages", expected, got });
        }
        let stage = |layers: &Vec<LayerCost>| {
            layers.iter().map(LayerCost::alone).fold(StageCost::default(), |sum, cost| StageCost {
                forward: sum.forward + cost.forward,
                backward_input: sum.backward_input + cost.backward_input,
                backward_weight: sum.backward_weight + cost.backward_weight,
            })
        };
        let stages = layers.iter().map(stage).collect();
        let costs = Costs { stages, links, overlap: Overlap::Woven(Woven::new(placement, layers)?) };
        costs.check(expected)?;
        Ok(costs)
    }

    pub(crate) fn check(&self, stages: usize) -> Result<()> {
        let count = |what, expected, got| match expected == got {
            true => Ok(()),
            false => Err(Error::CostCount { what, expected, got }),
        };
        count("stages", stages, self.stages.len())?;
        count("links", stages.saturating_sub(1), self.links.len())?;
        let of_stages =
            self.stages.iter().map(|c| [c.forward, c.backward_input, c.backward_weight]).enumerate();
        let of_links = self.links.iter().map(|c| [c.transfer, c.latency]).enumerate();
        let values = of_stages
            .flat_map(|(index, values)| values.map(|value| ("stage", index, value)))
            .chain(of_links.flat_map(|(index, values)| values.map(|value| ("link", index, value))));
        for (what, index, value) in values {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::Cost { what, index, value });
            }
        }
        match &self.overlap {
            Overlap::Hidden(share) if !(0.0..=1.0).contains(share) => {
                Err(Error::OverlapShare { value: *share })
            }
            Overlap::Hidden(_) => Ok(()),
            Overlap::Woven(woven) => count("stages", stages, woven.alone.len()),
        }
    }

    /// What a compute action takes.
    ///
    /// # Errors
    /// An overlap of stages that are not on one rank of the placement whose layers were woven.
    pub(crate) fn compute(&self, action: Action) -> Result<Took> {
        let Kind::Overlap { stage: back, .. } = action.kind else {
            return Ok(Took { time: self.pass(action), exposed: self.exposed(action) });
        };
        match &self.overlap {
            Overlap::Hidden(share) => {
                let f = self.pass(Action { kind: Kind::Forward, ..action });
                let b = self.pass(Action { kind: Kind::Backward, stage: back, ..action });
                Ok(Took { time: f + b - share * f.min(b), exposed: 0.0 })
            }
            Overlap::Woven(woven) => {
                let stages = (action.stage, back);
                woven.pairs.get(&stages).copied().ok_or(Error::NotWoven { action })
            }
        }
    }

    /// How long a pass takes that is no overlap.
    pub(crate) fn pass(&self, action: Action) -> f64 {
        let cost = &self.stages[action.stage as usize];
        match action.kind {
            Kind::Forward => cost.forward,
            Kind::BackwardInput => cost.backward_input,
            Kind::BackwardWeight => cost.backward_weight,
            Kind::Backward => cost.backward_input + cost.backward_weight,
            _ => 0.0,
        }
    }

    /// How long of it is waiting for all-to-alls.
    fn exposed(&self, action: Action) -> f64 {
        let Overlap::Woven(woven) = &self.overlap else { return 0.0 };
        match action.kind {
            Kind::Forward | Kind::BackwardInput | Kind::Backward => woven.alone[action.stage as usize],
            _ => 0.0,
        }
    }
}
