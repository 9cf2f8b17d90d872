//! `moe-train sample`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::Result;
use crate::infer::{Sampling, generate};
use crate::run::{open_tokenizer, open_weights};

/// Continue a text with a trained model.
#[derive(Debug, Args)]
pub struct Sample {
    /// The folder of a checkpoint, or of a run (its newest checkpoint).
    checkpoint: PathBuf,
    /// What is continued.
    #[arg(long, default_value = "The ")]
    prompt: String,
    /// Tokens to add.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Sample {
    pub fn run(self) -> Result<()> {
        let Sample { checkpoint, prompt, tokens, temperature, seed } = self;
        let weights = Arc::new(open_weights(&checkpoint)?);
        let tokenizer = open_tokenizer(&weights)?;
        println!("{}", generate(&weights, &tokenizer, &prompt, Sampling { tokens, temperature, seed })?);
        Ok(())
    }
}
