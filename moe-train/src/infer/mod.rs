//! Continuing a text with a trained model, on one rank.
//!
//! The prompt goes through the model once; each token after it goes alone, with the keys and values of those before it in
//! a [`KvCache`](moe_model::KvCache). The model sees at most its [context](context_length): a text that grows beyond it goes
//! on from the last half of the context, which goes through the model anew, so that no position is one that it was not
//! trained for.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use moe_train::infer::{Generation, Sampling, stop_tokens, write_text};
//! use moe_train::run::{open_tokenizer, open_weights};
//!
//! let weights = Arc::new(open_weights("runs/first".as_ref())?);
//! let tokenizer = open_tokenizer(&weights)?;
//! let sampling = Sampling { temperature: 0.7, top_p: 0.95, ..Sampling::default() };
//! let stop = stop_tokens(&weights, &tokenizer, &mut |unknown| eprintln!("{unknown}"))?;
//! let generation = Generation { tokens: 100, sampling, stop };
//! write_text(&weights, &tokenizer, b"The ", &generation, &mut std::io::stdout())?;
//! # Ok::<(), moe_train::Error>(())
//! ```

mod decoder;
mod error;
mod sampling;
mod stop;

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use moe_comm::{ThreadRank, ThreadWorld};
use moe_kernels::{Backend, Cpu, DType, Float};

use crate::Result;
use crate::checkpoint::Weights;
use crate::data::Tokenizer;
use crate::durable::Context;
use decoder::Decoder;
pub use error::InferError;
pub use sampling::Sampling;
pub use stop::stop_tokens;

/// How a text is continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Tokens to add, at most.
    pub tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Tokens before which the text ends.
    pub stop: Vec<u32>,
}

/// Nothing is communicated with one rank, so that nothing is waited for.
const DEADLINE: Duration = Duration::from_secs(60);

/// The positions that a model sees: the `max_position_embeddings` of the model of the hub that it is, or the sequence length
/// of the run that trained it, whichever is longer.
///
/// # Errors
/// Neither is known.
pub fn context_length(weights: &Weights) -> Result<usize> {
    let meta = weights.meta();
    let hub = meta.hub.as_ref().and_then(|hub| hub.config.get("max_position_embeddings")?.as_u64());
    let hub = hub.and_then(|positions| usize::try_from(positions).ok()).filter(|&positions| positions > 0);
    let run = |weights: &Weights| Ok(weights.run()?.config.train.sequence_length);
    match (hub, &meta.run) {
        (Some(positions), Some(_)) => Ok(positions.max(run(weights)?)),
        (Some(positions), None) => Ok(positions),
        (None, _) => run(weights),
    }
}

/// Continues `prompt` with the model of `weights` and hands each token to `each` when it is chosen, but not the one that stops
/// it. If `each` fails, no more are chosen.
///
/// # Errors
/// Those of [`Sampling::check`] and [`context_length`]; the prompt is empty or not of the model; the weights are damaged;
/// logits are not finite; those of `each`.
pub fn generate(
    weights: &Arc<Weights>,
    prompt: &[u32],
    generation: &Generation,
    mut each: impl FnMut(u32) -> Result<()>,
) -> Result<()> {
    generation.sampling.check()?;
    let vocab_size = weights.model().vocab_size;
    if prompt.is_empty() {
        return Err(InferError::EmptyPrompt.into());
    }
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(InferError::Vocabulary { token, vocab_size }.into());
    }
    let context = context_length(weights)?;
    let (weights, prompt, generation) = (weights.clone(), prompt.to_owned(), generation.clone());
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let model = scope.spawn(move || {
            ThreadWorld::run(1, DEADLINE, move |world| match weights.dtype() {
                DType::F64 => extend::<f64>(&world, &weights, context, &prompt, &generation, &sender),
                _ => extend::<f32>(&world, &weights, context, &prompt, &generation, &sender),
            })
        });
        // An error drops the receiver, at which the model stops.
        let shown = receiver.into_iter().try_for_each(&mut each);
        match model.join() {
            Ok(ended) => ended?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        shown
    })
}

/// Chooses tokens and sends them, until there are enough, one stops, or nobody listens.
fn extend<T: Float>(
    world: &ThreadRank,
    weights: &Weights,
    context: usize,
    prompt: &[u32],
    generation: &Generation,
    sender: &mpsc::Sender<u32>,
) -> Result<()>
where
    Cpu: Backend<T>,
{
    let Generation { tokens: wanted, sampling, stop } = generation;
    let capacity = context.min(prompt.len().saturating_add(*wanted));
    let mut decoder = Decoder::<T>::open(world, weights, capacity)?;
    let mut tokens = prompt.to_owned();
    let mut seen = 0;
    for n in 0..*wanted {
        if decoder.len() + (tokens.len() - seen) > context {
            decoder.clear();
            seen = tokens.len() - context.div_ceil(2);
        }
        let logits = decoder.logits(&tokens[seen..])?;
        seen = tokens.len();
        let token = sampling.choose(&logits, n as u64).ok_or(InferError::NotFinite { position: seen })?;
        if stop.contains(&token) || sender.send(token).is_err() {
            break;
        }
        tokens.push(token);
    }
    Ok(())
}

/// Writes `prompt` and its continuation to `out`, each token as soon as its text is known: characters are whole. `tokenizer`
/// is the model's; its special tokens are left out of the text.
///
/// # Errors
/// Those of [`generate`]; the tokenizer refuses; `out` cannot be written.
pub fn write_text(
    weights: &Arc<Weights>,
    tokenizer: &Tokenizer,
    prompt: &[u8],
    generation: &Generation,
    out: &mut dyn Write,
) -> Result<()> {
    let prompt = tokenizer.encode(prompt, true)?;
    let mut stream = tokenizer.stream(true);
    let mut write = |text: String| -> Result<()> {
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        Ok(written.context("write", Path::new("the text"))?)
    };
    // The text of a token may depend on those before it.
    for &token in &prompt {
        write(stream.push(token)?)?;
    }
    generate(weights, &prompt, generation, |token| write(stream.push(token)?))?;
    write(stream.finish()?)
}
