//! What a checkpoint holds besides tensors.

use std::collections::BTreeMap;
use std::path::Path;

use moe_model::ModelConfig;
use moe_model::hf::FloatType;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::container::{Checkpoint, CheckpointError};
use crate::config::RunConfig;
use crate::trainer::SkippedSteps;

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// The model whose tensors these are.
    pub model: ModelConfig,
    /// The folder of the hub that the weights came from, if they came from one, also by way of runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubOrigin>,
    /// Where the run stood that wrote it; none for weights alone, which belong to no run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunState>,
}

/// A folder of the hub, as far as a model that came from there is to go back as it came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubOrigin {
    /// Its `config.json`.
    pub config: Value,
    /// The type that most weights had.
    pub dtype: FloatType,
    /// The tensors that were of another type, by their names in a layout.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub other_dtypes: BTreeMap<String, FloatType>,
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
    /// That of a run's checkpoint, whose weights came from `hub` in the beginning.
    pub fn of_run(run: RunState, hub: Option<HubOrigin>) -> Self {
        Meta { model: run.config.model.clone(), hub, run: Some(run) }
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

    /// Refuses weights of another model; keys that act in training alone, [`ModelConfig::TRAINING_ALONE`], may differ.
    ///
    /// # Errors
    /// [`CheckpointError::OtherModel`].
    pub fn check_weights(&self, path: &Path, model: &ModelConfig) -> Result<(), CheckpointError> {
        self.check(path, model, |key| ModelConfig::TRAINING_ALONE.contains(&key))
    }

    /// Refuses a checkpoint of another model, naming the first key that differs; `path` is the checkpoint's.
    ///
    /// # Errors
    /// [`CheckpointError::OtherModel`].
    pub fn check_model(&self, path: &Path, model: &ModelConfig) -> Result<(), CheckpointError> {
        self.check(path, model, |_| false)
    }

    fn check(
        &self,
        path: &Path,
        model: &ModelConfig,
        may: impl Fn(&str) -> bool,
    ) -> Result<(), CheckpointError> {
        match self.model.first_difference(model, may) {
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
