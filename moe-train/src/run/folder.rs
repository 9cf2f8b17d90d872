//! Where a run keeps its files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::container::list;
use crate::checkpoint::copy_side_files;
use crate::data::Tokenizer;
use crate::durable::{Context, replace};
use crate::{Error, Result};

/// The name of the folder of a run's checkpoints.
pub(crate) const CHECKPOINTS: &str = "checkpoints";

/// The name of the folder, in a run's or beside the checkpoint of an import, of what else belongs to a model of the hub.
pub(crate) const SIDE_FILES: &str = "hub";

/// The folder of a run: `config.toml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/step-N/`, the tokens in `data/`, and in
/// `hub/` the tokenizer and what else belongs to a model that came from the hub.
#[derive(Debug, Clone)]
pub struct RunFolder(PathBuf);

/// The folder of checkpoints that `path` is, or has as that of a run: none if it is a checkpoint itself, or anything else.
/// An import and an upcycling make one without a run.
pub(crate) fn checkpoints_of(path: &Path) -> Option<PathBuf> {
    let of_run = RunFolder::new(path).checkpoints();
    match of_run.is_dir() {
        true => Some(of_run),
        false => list(path).is_ok_and(|listed| !listed.is_empty()).then(|| path.to_owned()),
    }
}

impl RunFolder {
    /// It need not exist.
    pub fn new(path: &Path) -> Self {
        RunFolder(path.to_owned())
    }

    /// One line per step and evaluation.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// Event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.0.join("tensorboard")
    }

    /// The folders `step-N`.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join(CHECKPOINTS)
    }

    /// What else belongs to a model of the hub that the run started from: its tokenizer above all.
    pub fn side_files(&self) -> PathBuf {
        self.0.join(SIDE_FILES)
    }

    /// The choices of routers, in folders `step-N`.
    pub fn routing(&self) -> PathBuf {
        self.0.join("routing")
    }

    /// Tokens to train on.
    pub fn train_tokens(&self) -> PathBuf {
        self.0.join("data").join("train.tokens")
    }

    /// Held-out tokens.
    pub fn held_out_tokens(&self) -> PathBuf {
        self.0.join("data").join("held_out.tokens")
    }

    /// Refuses a folder that a run was started in.
    pub(super) fn refuse_existing(&self) -> Result<()> {
        let started = [self.metrics(), self.checkpoints()];
        match started.iter().any(|path| path.exists()) {
            true => Err(Error::RunExists { path: self.0.clone() }),
            false => Ok(()),
        }
    }

    /// Makes the folder of the token files.
    pub(super) fn create_data(&self) -> Result<()> {
        let path = self.0.join("data");
        Ok(fs::create_dir_all(&path).context("create", &path)?)
    }

    /// Copies what else belongs to a model of the hub from the folder `from`, and then the tokenizer of the run, in place of what
    /// a run left here that ended before its first step.
    pub(super) fn take_side_files(&self, from: Option<&Path>, tokenizer: &Tokenizer) -> Result<()> {
        let own = self.side_files();
        if own.exists() {
            fs::remove_dir_all(&own).context("remove", &own)?;
        }
        if let Some(from) = from {
            copy_side_files(from, &own)?;
        }
        Ok(tokenizer.copy_to(&own)?)
    }

    /// Writes the resolved configuration.
    pub(super) fn write_config(&self, toml: &str) -> Result<()> {
        fs::create_dir_all(&self.0).context("create", &self.0)?;
        Ok(replace(&self.0.join("config.toml"), toml.as_bytes())?)
    }
}
