//! What a checkpoint holds besides tensors.

use std::path::Path;

use moe_model::ModelConfig;
use serde::{Deserialize, Serialize};

use super::container::{Checkpoint, CheckpointError};
use crate::config::RunConfig;
use crate::trainer::SkippedSteps;

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// The model whose tensors these are.
    pub model: ModelConfig,
    /// Where the run stood that wrote it; none for weights alone, which belong to no run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunState>,
}

/// The state of a run that is no tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Updates that the optimizer made: fewer than steps if gradients were not finite.
    pub updates: u64,
    /// Steps that were skipped because their loss or gradient was not finite.
    #[serde(default)]
    pub skipped: SkippedSteps,
    /// The next global sample index, which is all the state of the data order.
    pub cursor: u64,
    /// Samples of each dataset of a blend, which the order is of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blend_samples: Vec<u64>,
    /// The configuration of the run.
    pub config: RunConfig,
}

impl Meta {
    /// That of a run's checkpoint.
    pub fn of_run(run: RunState) -> Self {
        Meta { model: run.config.model.clone(), run: Some(run) }
    }

    /// Reads that of a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::Manifest`] if it is not the meta data of a model.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        serde_json::from_value(checkpoint.meta().clone()).map_err(|error| CheckpointError::Manifest {
            path: checkpoint.path().to_owned(),
            what: format!("is not that of a model: {error}"),
        })
    }

    /// Refuses a checkpoint of another model, naming the first key that differs; `path` is the checkpoint's.
    ///
    /// # Errors
    /// [`CheckpointError::OtherModel`].
    pub fn check_model(&self, path: &Path, model: &ModelConfig) -> Result<(), CheckpointError> {
        match first_difference(&self.model, model, |_| false) {
            None => Ok(()),
            Some((key, written, wanted)) => {
                Err(CheckpointError::OtherModel { path: path.to_owned(), key, written, wanted })
            }
        }
    }
}

impl RunState {
    /// Reads that of a run's checkpoint.
    ///
    /// # Errors
    /// As [`Meta::of`], and [`CheckpointError::NoRun`] if there are weights alone.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let path = checkpoint.path().to_owned();
        Meta::of(checkpoint)?.run.ok_or(CheckpointError::NoRun { path })
    }
}

/// The first key in which two models differ, but for those that may, with its values.
pub(super) fn first_difference(
    a: &ModelConfig,
    b: &ModelConfig,
    may: impl Fn(&str) -> bool,
) -> Option<(String, String, String)> {
    let keys = |model: &ModelConfig| match serde_json::to_value(model) {
        Ok(serde_json::Value::Object(keys)) => keys,
        _ => serde_json::Map::new(),
    };
    let (a, b) = (keys(a), keys(b));
    let mut names = a.keys().chain(b.keys());
    let name = names.find(|name| a.get(*name) != b.get(*name) && !may(name))?;
    let show = |value: Option<&serde_json::Value>| value.map_or("absent".to_owned(), ToString::to_string);
    Some((name.clone(), show(a.get(name)), show(b.get(name))))
}
