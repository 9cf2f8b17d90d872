//! `moe-train schedule`.

mod report;
mod sizes;
mod times;

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use moe_pipeline::{add_send_recv, lower};

use self::sizes::{Chosen, Pipeline, program, read};
use self::times::Times;
use crate::Result;

/// Look into pipeline schedules.
#[derive(Debug, Subcommand)]
pub enum Schedule {
    /// Print or draw a schedule.
    #[command(
        override_usage = "moe-train schedule show [OPTIONS] <NAME --pp <PP> --microbatches <MICROBATCHES>|--file <FILE>>"
    )]
    Show {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        times: Times,
        /// What to print.
        #[arg(long, value_enum, default_value_t = Format::Picture)]
        format: Format,
        /// With messages, in text; as torch has them without waits, or all that ours do.
        #[arg(long)]
        lowered: bool,
        /// How many characters a picture's timeline is wide.
        #[arg(long, default_value_t = 100)]
        columns: u16,
    },
    /// Check a schedule in text: a line per rank, actions separated by commas, with or without messages.
    Check {
        /// The file, as `show --format csv` and torch write it.
        file: PathBuf,
        /// The most activations that a rank may keep.
        #[arg(long)]
        budget: Option<u32>,
    },
    /// Say how long a step takes, and why ranks idle.
    #[command(
        override_usage = "moe-train schedule simulate [OPTIONS] <NAME --pp <PP> --microbatches <MICROBATCHES>|--file <FILE>>"
    )]
    Simulate {
        #[command(flatten)]
        chosen: Chosen,
        #[command(flatten)]
        times: Times,
    },
    /// Compare all schedules on the same ranks, micro-batches and times, and the best that a search for these times finds.
    Compare {
        #[command(flatten)]
        pipeline: Pipeline,
        /// The most activations, of all of a rank's layers, that the search may keep on a rank; as many as ranks unless given.
        #[arg(long)]
        activations: Option<u32>,
        #[command(flatten)]
        times: Times,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A timeline of characters.
    Picture,
    /// A line per rank.
    Csv,
    /// The same as torch's pipelining has it: overlaps are taken apart before messages are added, waits are left out.
    TorchCsv,
    /// A drawing.
    Svg,
    /// A trace for Perfetto, a unit of time as a microsecond.
    Trace,
}

impl Schedule {
    pub fn run(self) -> Result<()> {
        let text = match self {
            Schedule::Show { chosen, times, format, lowered, columns } => {
                let schedule = chosen.schedule()?;
                match format {
                    Format::Csv if lowered => lower(&schedule)?.to_string(),
                    Format::TorchCsv if lowered => add_send_recv(&schedule.serial()?)?.to_string(),
                    Format::Csv | Format::TorchCsv => schedule.to_string(),
                    Format::Picture | Format::Svg | Format::Trace => {
                        let program = program(schedule, None)?;
                        let timeline = times.simulate(&program)?;
                        match format {
                            Format::Svg => timeline.svg(),
                            Format::Trace => timeline.chrome_trace(),
                            _ => timeline.draw(columns) + &report::summary(&program, &timeline),
                        }
                    }
                }
            }
            Schedule::Check { file, budget } => report::checked(&program(read(&file)?, budget)?),
            Schedule::Simulate { chosen, times } => {
                let program = program(chosen.schedule()?, None)?;
                let timeline = times.simulate(&program)?;
                report::ranks(&program, &timeline) + &report::summary(&program, &timeline)
            }
            Schedule::Compare { pipeline, activations, times } => {
                let ranks = activations.unwrap_or(pipeline.ranks());
                let schedules = pipeline.named().chain(pipeline.searched(&times, ranks));
                let simulated = schedules.map(|(name, schedule)| {
                    let row = schedule.and_then(|schedule| {
                        let program = program(schedule, None)?;
                        let timeline = times.simulate(&program)?;
                        Ok((program, timeline))
                    });
                    (name, row)
                });
                report::comparison(simulated)
            }
        };
        print!("{text}");
        Ok(())
    }
}
