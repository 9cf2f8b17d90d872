//! Which schedule, and what its passes cost.

use clap::Args;
use moe_pipeline::generate::{Named, Sizes};
use moe_pipeline::{Costs, Link, Program, Result, Schedule, StageCost, Timeline, simulate};

/// How large a pipeline is.
#[derive(Debug, Args)]
pub struct Pipeline {
    /// Ranks.
    #[arg(long)]
    pp: u32,
    /// Stages per rank; unless given, as many as the schedule has, or 2 where it may have any number.
    #[arg(long)]
    vpp: Option<u32>,
    /// Micro-batches of a step.
    #[arg(long)]
    microbatches: u32,
    /// Micro-batches that go through one stage before the next, in interleaved schedules.
    #[arg(long)]
    group: Option<u32>,
}

/// A schedule and its sizes.
#[derive(Debug, Args)]
pub struct Chosen {
    /// Its name, here or in torch.
    name: Named,
    #[command(flatten)]
    pipeline: Pipeline,
}

impl Pipeline {
    /// The schedule of these sizes. A number of stages that it cannot have is replaced by its own.
    pub fn generate(&self, named: Named) -> Result<Schedule> {
        let vpp = named.virtual_stages().or(self.vpp);
        Pipeline { vpp, ..*self }.exactly(named)
    }

    fn exactly(&self, named: Named) -> Result<Schedule> {
        named.generate(Sizes {
            ranks: self.pp,
            virtual_stages: self.vpp.or(named.virtual_stages()).unwrap_or(2),
            microbatches: self.microbatches,
            group: self.group,
        })
    }
}

impl Chosen {
    pub fn generate(&self) -> Result<Schedule> {
        self.pipeline.exactly(self.name)
    }
}

/// What passes and messages take, in any unit of time.
#[derive(Debug, Args)]
pub struct Times {
    /// Forward pass, input gradient and weight gradient of a micro-batch through all of a rank's layers.
    #[arg(long, value_name = "F,I,W", default_value = "1,1,1", value_parser = numbers::<3>)]
    times: [f64; 3],
    /// A message between neighbouring ranks: how long it occupies the link, and how long after that it arrives.
    #[arg(long, value_name = "TRANSFER,LATENCY", default_value = "0,0", value_parser = numbers::<2>)]
    link: [f64; 2],
    /// What part of the shorter pass of an overlap hides behind the longer one, from 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    overlap: f64,
}

impl Times {
    /// Runs a program whose ranks have equal layers, the same number in each of their stages.
    pub fn simulate(&self, program: &Program) -> Result<Timeline> {
        let [forward, backward_input, backward_weight] = self.times.map(|time| time * share(program));
        let [transfer, latency] = self.link;
        let stages = program.schedule().placement().stages();
        let cost = StageCost { forward, backward_input, backward_weight };
        let costs = Costs::uniform(stages, cost, Link { transfer, latency });
        simulate(program, &Costs { overlap: self.overlap, ..costs })
    }
}

/// The part of the model's layers on a rank, if it had no copies, that one stage is: 1 of one stage per rank and of stages that
/// are copies, 1/v of v stages.
pub fn share(program: &Program) -> f64 {
    let placement = program.schedule().placement();
    f64::from(placement.ranks()) * f64::from(placement.copies()) / f64::from(placement.stages())
}

fn numbers<const N: usize>(text: &str) -> std::result::Result<[f64; N], String> {
    let numbers: Option<Vec<f64>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let numbers = numbers.and_then(|numbers| <[f64; N]>::try_from(numbers).ok());
    numbers.ok_or_else(|| format!("{N} numbers separated by commas are needed"))
}
