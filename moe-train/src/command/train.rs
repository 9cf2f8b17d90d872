//! `moe-train train`.

use std::path::PathBuf;

use clap::Args;

use crate::config::RunConfig;
use crate::{Result, run};

/// Train a model as a config file says.
#[derive(Debug, Args)]
pub struct Train {
    /// The configuration, TOML.
    config: PathBuf,
    /// Override a setting, as in --set train.steps=100; may be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// Go on from the newest checkpoint of the run's folder, under this or another folding.
    #[arg(long)]
    resume: bool,
}

impl Train {
    pub fn run(self) -> Result<()> {
        let config = RunConfig::load(&self.config, &self.set)?;
        match run::launch(&config)? {
            true => Ok(()),
            false => run::train(&config, self.resume),
        }
    }
}
