//! Which schedule.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use moe_pipeline::generate::{Named, Sizes, for_costs};
use moe_pipeline::{Kind, Placement, Program, Schedule, add_waits, lower, validate};

use super::times::Times;
use crate::Result;
use crate::config::ConfigError;
use crate::durable::Context;

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
    /// Micro-batches that go through one stage before the next, in interleaved schedules; unless given, as many as torch takes: of m
    /// in all, m / ⌊m / pp⌋, or m where that is fewer than pp. (A run takes pp unless parallel.micro_batch_group_size is given.)
    #[arg(long)]
    group: Option<u32>,
}

/// A schedule: of a name and sizes, or from a file.
#[derive(Debug, Args)]
pub struct Chosen {
    /// Its name, here or in torch.
    #[arg(required_unless_present = "file")]
    name: Option<Named>,
    /// A file that has it, as `show --format csv` and torch write it, with or without messages.
    #[arg(long, conflicts_with_all = ["name", "pp", "vpp", "microbatches", "group"])]
    file: Option<PathBuf>,
    // Nothing of it is required beside a file, as they conflict.
    #[command(flatten)]
    pipeline: Option<Pipeline>,
}

impl Pipeline {
    /// Every named schedule of these sizes, or why there is none. A number of stages that one cannot have is replaced by its own.
    pub fn named(&self) -> impl Iterator<Item = (String, moe_pipeline::Result<Schedule>)> {
        Named::ALL.iter().copied().map(|named| {
            let vpp = named.virtual_stages().or(self.vpp);
            (named.to_string(), Pipeline { vpp, ..*self }.generate(named))
        })
    }

    /// The shortest steps found for these times, by placement, with no more kept than `ranks` activations of all layers of a
    /// rank: as many as 1F1B keeps.
    pub fn searched(
        &self,
        times: &Times,
        ranks: u32,
    ) -> impl Iterator<Item = (String, moe_pipeline::Result<Schedule>)> {
        let vpp = self.vpp.unwrap_or(2);
        let placements = [
            ("for-costs", 1, Placement::linear(self.pp)),
            ("for-costs-looped", vpp, Placement::looped(self.pp, vpp)),
            ("for-costs-v", 2, Placement::v_shaped(self.pp)),
        ];
        placements.into_iter().map(move |(name, stages, placement)| {
            let found = placement.and_then(|placement| {
                for_costs(
                    &placement,
                    self.microbatches,
                    &times.costs(&placement)?,
                    ranks.saturating_mul(stages),
                )
            });
            (name.to_owned(), found)
        })
    }

    /// Ranks.
    pub fn ranks(&self) -> u32 {
        self.pp
    }

    fn generate(&self, named: Named) -> moe_pipeline::Result<Schedule> {
        named.generate(Sizes {
            ranks: self.pp,
            virtual_stages: self.vpp.or(named.virtual_stages()).unwrap_or(2),
            microbatches: self.microbatches,
            group: self.group,
        })
    }
}

impl Chosen {
    pub fn schedule(&self) -> Result<Schedule> {
        match (&self.file, self.name, &self.pipeline) {
            (Some(file), ..) => read(file),
            (None, Some(named), Some(pipeline)) => Ok(pipeline.generate(named)?),
            (None, ..) => {
                let (setting, problem) = ("--file", "is needed");
                let other = "no name and sizes of a schedule".to_owned();
                let fix = "name one, with --pp and --microbatches".to_owned();
                Err(ConfigError::Conflict { setting, problem, other, fix }.into())
            }
        }
    }
}

/// A schedule in text.
pub fn read(file: &Path) -> Result<Schedule> {
    Ok(fs::read_to_string(file).context("read", file)?.parse()?)
}

/// The program of a schedule with all its messages, or with as many as torch writes, or with none.
pub fn program(schedule: Schedule, budget: Option<u32>) -> moe_pipeline::Result<Program> {
    let any = |of: fn(Kind) -> bool| schedule.actions().any(|at| of(at.action.kind));
    let messages = any(|kind| !kind.is_compute());
    let waits = any(|kind| matches!(kind, Kind::WaitSend(_) | Kind::WaitRecv(_)));
    let whole = match (messages, waits) {
        (false, _) => lower(&schedule)?,
        (true, false) => add_waits(&schedule)?,
        (true, true) => schedule,
    };
    validate(whole, budget)
}
