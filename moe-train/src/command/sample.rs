//! `moe-train sample`.

use std::io::{Read, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::Result;
use crate::checkpoint::Weights;
use crate::data::{EosToken, Tokenizer, TokenizerKind};
use crate::durable::Context;
use crate::infer::{Generation, InferError, Sampling, stop_tokens, write_text};
use crate::run::{open_tokenizer, open_weights};

/// Continue a text with a trained model.
#[derive(Debug, Args)]
pub struct Sample {
    /// The folder of a checkpoint, of a run (its newest checkpoint), or of the Hugging Face hub.
    checkpoint: PathBuf,
    /// What is continued; - for the standard input.
    #[arg(long, default_value = "The ", allow_hyphen_values = true)]
    prompt: String,
    /// Tokens to add, at most.
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among so many tokens, the likeliest.
    #[arg(long)]
    top_k: Option<usize>,
    /// Choose among the fewest tokens, the likeliest first, whose probabilities sum to at least this.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// A token before which the text ends, by number or as the vocabulary has it, or none; may be given several times. What
    /// the model's own files name unless given.
    #[arg(long, value_name = "TOKEN")]
    stop: Vec<EosToken>,
    /// byte, a tokenizer.json, or a folder that has one; that of the model unless given.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Sample {
    pub fn run(self) -> Result<()> {
        let Sample { checkpoint, prompt, tokens, temperature, top_k, top_p, stop, tokenizer, seed } = self;
        let weights = Arc::new(open_weights(&checkpoint)?);
        let tokenizer = tokenizer_of(&weights, tokenizer)?;
        let stop = match stop.is_empty() {
            true => stop_tokens(&weights, &tokenizer, &mut |unknown| eprintln!("warning: {unknown}"))?,
            false => {
                let mut ids = Vec::new();
                for token in &stop {
                    ids.extend(stop_id(&tokenizer, token)?);
                }
                ids
            }
        };
        let sampling = Sampling { temperature, top_k, top_p, seed };
        let prompt = match prompt.as_str() {
            "-" => {
                let mut text = Vec::new();
                stdin().read_to_end(&mut text).context("read", Path::new("the standard input"))?;
                text
            }
            text => text.as_bytes().to_owned(),
        };
        let mut out = stdout();
        write_text(&weights, &tokenizer, &prompt, &Generation { tokens, sampling, stop }, &mut out)?;
        Ok(writeln!(out).context("write", Path::new("the text"))?)
    }
}

/// The tokenizer that is named, or that of the model.
pub(super) fn tokenizer_of(weights: &Weights, named: Option<PathBuf>) -> Result<Tokenizer> {
    match named {
        Some(path) => Ok(Tokenizer::open(&TokenizerKind::from(path))?),
        None => open_tokenizer(weights),
    }
}

/// The number of a token; none for `none`.
fn stop_id(tokenizer: &Tokenizer, token: &EosToken) -> Result<Option<u32>> {
    let token = match token {
        EosToken::Id(id) => return Ok(Some(*id)),
        EosToken::Token(token) if token == "none" => return Ok(None),
        EosToken::Token(token) => token,
    };
    let allowed = "a token as the tokenizer's vocabulary has it, the number of one, or none";
    let unknown = || InferError::Setting { name: "--stop", value: token.clone(), allowed };
    Ok(Some(tokenizer.token_to_id(token).ok_or_else(unknown)?))
}
