//! `moe-train eval`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use moe_kernels::DType;

use super::axes::Parallel;
use super::dtype::HostDType;
use super::sample::tokenizer_of;
use crate::checkpoint::{Meta, RunState, Weights, is_hub_folder};
use crate::config::{ConfigError, ParallelConfig};
use crate::eval::{EvalError, Options, Perplexity, Text, perplexity};
use crate::infer::context_length;
use crate::run::{RunFolder, open_checkpoint, open_weights};
use crate::{Result, run};

/// Measure how well a model predicts text: the held-out tokens of its run, or files of text.
#[derive(Debug, Args)]
pub struct Eval {
    /// The folder of a checkpoint, of a run (its newest checkpoint), or, with --text, of the Hugging Face hub.
    checkpoint: PathBuf,
    /// Files of text, each of them one document, or of JSON lines (.jsonl, .ndjson, .json, or any with --field). What is
    /// measured is the perplexity.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["batches", "tokens"])]
    text: Vec<PathBuf>,
    /// The field of JSON lines whose string is a document; text unless given.
    #[arg(long, requires = "text")]
    field: Option<String>,
    /// byte, a tokenizer.json, or a folder that has one; that of the model unless given.
    #[arg(long, requires = "text")]
    tokenizer: Option<PathBuf>,
    /// Tokens that the model sees before a prediction, at most; its context unless given.
    #[arg(long, requires = "text")]
    sequence_length: Option<usize>,
    /// The type of all computation; f64 if weights are, else f32, unless given.
    #[arg(long, value_enum, requires = "text")]
    dtype: Option<HostDType>,
    /// Held-out batches of `global_batch_size` sequences, at most; those of the run unless given.
    #[arg(long)]
    batches: Option<usize>,
    /// Tokens: a file, or the prefix of .bin and .idx in Megatron's format; what the run is evaluated on unless given.
    #[arg(long, value_name = "FILE")]
    tokens: Option<PathBuf>,
    // That of the run unless given.
    #[command(flatten)]
    parallel: Parallel,
}

impl Eval {
    pub fn run(self) -> Result<()> {
        match self.text.is_empty() {
            true => self.held_out(),
            false => self.texts(),
        }
    }

    /// What a run is evaluated on.
    fn held_out(self) -> Result<()> {
        if is_hub_folder(&self.checkpoint) {
            return Err(EvalError::NoText { path: self.checkpoint }.into());
        }
        let checkpoint = open_checkpoint(&self.checkpoint)?;
        let Some(RunState { mut config, .. }) = Meta::of(&checkpoint)?.run else {
            return Err(EvalError::NoText { path: checkpoint.path().to_owned() }.into());
        };
        config.train.eval_batches = self.batches.unwrap_or(config.train.eval_batches);
        config.parallel = self.parallel.config().unwrap_or(config.parallel);
        config.check()?;
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
        if run::launch(&config)? {
            return Ok(());
        }
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

    /// Files of text.
    fn texts(self) -> Result<()> {
        let Eval { text, field, tokenizer, sequence_length, dtype, parallel, .. } = self;
        let weights = Arc::new(open_weights(&self.checkpoint)?);
        let sequence_length = match sequence_length {
            Some(length) => length,
            None => context_length(&weights)
                .map_err(|_| EvalError::NoContext { path: weights.path().to_owned() })?,
        };
        let tokenizer = tokenizer_of(&weights, tokenizer)?;
        let texts = text.iter().map(|path| Text::read(path, field.as_deref(), &tokenizer));
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let run = weights.meta().run.as_ref().map(|run| &run.config);
        let of_run = || run.map_or_else(ParallelConfig::default, |config| config.parallel.clone());
        let options = Options { parallel: parallel.config().unwrap_or_else(of_run), sequence_length };
        let dtype = dtype.unwrap_or(match weights.dtype() {
            DType::F64 => HostDType::F64,
            _ => HostDType::F32,
        });
        let measured = match dtype {
            HostDType::F32 => perplexity::<f32>(&weights, &texts, &options)?,
            HostDType::F64 => perplexity::<f64>(&weights, &texts, &options)?,
        };
        println!("windows of {sequence_length} tokens, in {dtype}");
        for (text, measured) in texts.iter().zip(&measured) {
            print(&text.path, measured);
        }
        if measured.len() > 1 {
            print("all".as_ref(), &measured.iter().copied().sum());
        }
        Ok(())
    }
}

fn print(what: &Path, measured: &Perplexity) {
    let Perplexity { documents, tokens, .. } = measured;
    println!(
        "{}: {documents} {}, {tokens} tokens predicted, loss {:.6} nats per token, perplexity {:.4}, {:.4} bits per byte",
        what.display(),
        if *documents == 1 { "document" } else { "documents" },
        measured.loss(),
        measured.perplexity(),
        measured.bits_per_byte()
    );
}
