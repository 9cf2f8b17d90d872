//! What passes and messages cost.

use clap::Args;
use moe_pipeline::weave::LayerCost;
use moe_pipeline::{Costs, Link, Overlap, Placement, Program, Result, StageCost, Timeline, simulate};

/// What passes and messages take, in any unit of time.
#[derive(Debug, Args)]
pub struct Times {
    /// Forward pass, input gradient and weight gradient of a micro-batch through all of a rank's layers, all-to-alls apart.
    #[arg(long, value_name = "F,I,W", default_value = "1,1,1", value_parser = numbers::<3>)]
    times: [f64; 3],
    /// The same by stage, where stages are not alike.
    #[arg(long, value_name = "F,I,W;F,I,W;…", value_delimiter = ';', value_parser = numbers::<3>,
          conflicts_with_all = ["times", "layers", "all_to_all"])]
    stage_times: Vec<[f64; 3]>,
    /// A message between neighbouring ranks: how long it occupies the link, and how long after that it arrives.
    #[arg(long, value_name = "TRANSFER,LATENCY", default_value = "0,0", value_parser = numbers::<2>)]
    link: [f64; 2],
    /// What part of the shorter pass of an overlap hides behind the longer one, from 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    overlap: f64,
    /// Layers of experts that each rank has, half of each being attention: overlaps are then woven layer by layer, in the order that
    /// is shortest at these costs. (A run knows no costs: to it an all-to-all is half as long again as attention or experts are.)
    #[arg(long, requires = "all_to_all", conflicts_with = "overlap")]
    layers: Option<u32>,
    /// What each of the four all-to-alls of a layer takes.
    #[arg(long, requires = "layers")]
    all_to_all: Option<f64>,
}

impl Times {
    /// Runs a program on paper.
    pub fn simulate(&self, program: &Program) -> Result<Timeline> {
        simulate(program, &self.costs(program.schedule().placement())?)
    }

    /// The costs of a placement: those of its stages if these were given; otherwise its ranks have equal layers, the same number in
    /// each of their stages, or one more in their first ones.
    pub fn costs(&self, placement: &Placement) -> Result<Costs> {
        let [transfer, latency] = self.link;
        let links = vec![Link { transfer, latency }; placement.stages().saturating_sub(1) as usize];
        let overlap = Overlap::Hidden(self.overlap);
        if !self.stage_times.is_empty() {
            let stages = self.stage_times.iter().map(|&times| cost(times, 1.0)).collect();
            return Ok(Costs { stages, links, overlap });
        }
        let (Some(layers), Some(all_to_all)) = (self.layers, self.all_to_all) else {
            let stages = vec![cost(self.times, share(placement)); placement.stages() as usize];
            return Ok(Costs { stages, links, overlap });
        };
        let half = cost(self.times, 0.5 / f64::from(layers));
        let layer = LayerCost::Moe { attention: half, experts: half, all_to_all };
        let stages = (0..placement.stages()).map(|stage| vec![layer; layers_of(placement, stage, layers)]);
        Costs::of_layers(placement, &stages.collect::<Vec<_>>(), links)
    }
}

/// How many of a rank's layers are on one of its stages. Copies hold the same layers.
fn layers_of(placement: &Placement, stage: u32, layers: u32) -> usize {
    let of_rank = placement.rank_of(stage).map_or(&[][..], |rank| placement.stages_of(rank));
    let own = of_rank.len() as u32 / placement.copies();
    let at = of_rank.iter().position(|&other| other == stage).unwrap_or(0) as u32;
    let (all, rest) = (layers.checked_div(own).unwrap_or(0), layers.checked_rem(own).unwrap_or(0));
    (all + u32::from(at.checked_rem(own).unwrap_or(0) < rest)) as usize
}

/// The part of the model's layers on a rank, if it had no copies, that one stage is: 1 of one stage per rank and of stages that
/// are copies, 1/v of v stages.
pub fn share(placement: &Placement) -> f64 {
    f64::from(placement.ranks()) * f64::from(placement.copies()) / f64::from(placement.stages())
}

fn cost(times: [f64; 3], share: f64) -> StageCost {
    let [forward, backward_input, backward_weight] = times.map(|time| time * share);
    StageCost { forward, backward_input, backward_weight }
}

fn numbers<const N: usize>(text: &str) -> std::result::Result<[f64; N], String> {
    let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[f64; N]>::try_from(numbers).ok());
    numbers.ok_or_else(|| format!("{N} numbers separated by commas are needed"))
}
