//! `[parallel] schedule`: the order of a pipeline's passes, by name.

use moe_pipeline::Schedule;
use moe_pipeline::generate::{Named, Sizes};
use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::Serializer;

use super::{ConfigError, ParallelConfig, require};

pub(super) fn serialize<S: Serializer>(named: &Option<Named>, serializer: S) -> Result<S::Ok, S::Error> {
    match named {
        Some(named) => serializer.collect_str(named),
        None => serializer.serialize_none(),
    }
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Named>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(D::Error::custom)
}

impl ParallelConfig {
    /// The order of a training step's passes: as given, else 1F1B, interleaved if ranks have several stages.
    ///
    /// # Errors
    /// It is one that does not train, or is for another number of virtual stages.
    pub fn schedule(&self) -> Result<Named, ConfigError> {
        let named = match self.schedule {
            Some(named) => named,
            None if self.vpp > 1 => Named::Interleaved1F1B,
            None => Named::OneFOneB,
        };
        if named == Named::DualPipe {
            let setting = format!("parallel.schedule = \"{named}\"");
            let fix = "it keeps two copies of each stage's weights; \"dual-pipe-v\" overlaps the same passes over one";
            return Err(ConfigError::Unsupported { setting, fix });
        }
        if let Some(expected) = named.virtual_stages() {
            let allowed = format!("{expected} with parallel.schedule = \"{named}\"");
            require("parallel.vpp", self.vpp, self.vpp == expected as usize, &allowed)?;
        }
        Ok(named)
    }

    /// That a step may have so many micro-batches on each data-parallel rank.
    ///
    /// # Errors
    /// Those of [`schedule`](Self::schedule), a group of micro-batches that has no meaning, or a schedule that does not take so
    /// many.
    pub(super) fn check_passes(&self, microbatches: usize) -> Result<(), ConfigError> {
        let named = self.schedule()?;
        let group = self.micro_batch_group_size;
        if let Some(group) = group {
            let setting = "parallel.micro_batch_group_size";
            require(setting, group, self.vpp > 1, "left out where parallel.vpp = 1")?;
            if !named.has_groups() {
                let (problem, fix) = ("has no meaning", "remove it".to_owned());
                let other = format!("parallel.schedule = \"{named}\"");
                return Err(ConfigError::Conflict { setting, problem, other, fix });
            }
            // One group of fewer micro-batches than ranks is a schedule, but one that leaves ranks without work.
            if group < self.pp {
                let [ranks, virtual_stages, microbatches, group] =
                    [self.pp, self.vpp, microbatches, group].map(|n| n as u32);
                return Err(moe_pipeline::Error::Group { ranks, virtual_stages, microbatches, group }.into());
            }
        }
        training_passes(named, [self.pp, self.vpp], microbatches, group)?;
        Ok(())
    }
}

/// The passes of a training step over so many ranks with so many stages each, and micro-batches of each data-parallel rank; in
/// groups of as many micro-batches as ranks unless given.
///
/// # Errors
/// Those of [`Named::generate`].
pub(crate) fn training_passes(
    schedule: Named,
    [ranks, virtual_stages]: [usize; 2],
    microbatches: usize,
    group: Option<usize>,
) -> moe_pipeline::Result<Schedule> {
    let [ranks, virtual_stages, microbatches, group] =
        [ranks, virtual_stages, microbatches, group.unwrap_or(ranks)].map(|n| n as u32);
    schedule.generate(Sizes { ranks, virtual_stages, microbatches, group: Some(group) })
}
