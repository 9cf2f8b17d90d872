//! `moe-train eval`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::checkpoint::{RunState, Weights};
use crate::run::RunFolder;
use crate::run::open_checkpoint;
use crate::{Result, run};

/// Measure the loss of a trained model on held-out text, under the folding it was trained with.
#[derive(Debug, Args)]
pub struct Eval {
    /// The folder of a checkpoint, or of a run (its newest checkpoint).
    checkpoint: PathBuf,
    /// Held-out batches of `global_batch_size` sequences, at most; those of the run unless given.
    #[arg(long)]
    batches: Option<usize>,
    /// A file of tokens; the held-out tokens of the run unless given.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
}

impl Eval {
    pub fn run(self) -> Result<()> {
        let checkpoint = open_checkpoint(&self.checkpoint)?;
        let RunState { mut config, .. } = RunState::of(&checkpoint)?;
        config.train.eval_batches = self.batches.unwrap_or(config.train.eval_batches);
        let run = checkpoint.path().parent().and_then(|checkpoints| checkpoints.parent());
        let tokens = match (self.tokens, run) {
            (Some(tokens), _) => tokens,
            (None, run) => RunFolder::new(run.unwrap_or(".".as_ref())).held_out_tokens(),
        };
        let step = checkpoint.step();
        match run::evaluate(&config, &Arc::new(Weights::of(checkpoint)?), &tokens)? {
            Some(loss) => println!(
                "step {step}: validation loss {loss:.6} nats per token, perplexity {:.4}",
                loss.exp()
            ),
            None => println!("no token counts"),
        }
        Ok(())
    }
}
