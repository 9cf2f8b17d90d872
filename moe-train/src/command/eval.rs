//! `moe-train eval`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::checkpoint::{RunState, Weights};
use crate::config::ConfigError;
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
    /// Tokens: a file, or the prefix of .bin and .idx in Megatron's format; what the run is evaluated on unless given.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
}

impl Eval {
    pub fn run(self) -> Result<()> {
        let checkpoint = open_checkpoint(&self.checkpoint)?;
        let RunState { mut config, .. } = RunState::of(&checkpoint)?;
        config.train.eval_batches = self.batches.unwrap_or(config.train.eval_batches);
        let run = checkpoint.path().parent().and_then(|checkpoints| checkpoints.parent());
        let sets = match self.tokens {
            Some(tokens) => vec![run::open_held_out(&config, &tokens)?],
            None => run::held_out_sets(&config, &RunFolder::new(run.unwrap_or(".".as_ref())))?,
        };
        if sets.is_empty() {
            let (setting, problem) = ("--tokens", "is needed");
            let other = "a run that was evaluated on nothing".to_owned();
            let fix = "name tokens to evaluate on".to_owned();
            Err(ConfigError::Conflict { setting, problem, other, fix })?;
        }
        // One set needs no name.
        let names: Vec<String> = match &sets[..] {
            [_] => vec![String::new()],
            sets => sets.iter().map(|set| format!(" on {}", set.path().display())).collect(),
        };
        let step = checkpoint.step();
        let losses = run::evaluate(&config, &Arc::new(Weights::of(checkpoint)?), sets)?;
        for (loss, on) in losses.into_iter().zip(names) {
            match loss {
                Some(loss) => println!(
                    "step {step}: validation loss {loss:.6} nats per token, perplexity {:.4}{on}",
                    loss.exp()
                ),
                None => println!("no token counts{on}"),
            }
        }
        Ok(())
    }
}
