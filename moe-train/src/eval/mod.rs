//! How well a model predicts texts, under any folding: *Perplexity* of `docs/semantics.md`.
//!
//! Documents are cut into windows of the model's context that follow each other; as many windows as fit share a sequence, in
//! which none sees another. So every token is predicted once, but the first of each document, and no number depends on the
//! folding or on what else is evaluated.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use moe_train::eval::{Options, Text, perplexity};
//! use moe_train::infer::context_length;
//! use moe_train::run::{open_tokenizer, open_weights};
//!
//! let weights = Arc::new(open_weights("runs/first".as_ref())?);
//! let text = Text::read("held_out.txt".as_ref(), None, &open_tokenizer(&weights)?)?;
//! let options = Options { parallel: Default::default(), sequence_length: context_length(&weights)? };
//! let measured = perplexity::<f32>(&weights, &[text], &options)?[0];
//! println!("{} after {} tokens", measured.perplexity(), measured.tokens);
//! # Ok::<(), moe_train::Error>(())
//! ```

mod error;
mod rank;
mod text;
mod windows;

use std::iter::Sum;
use std::sync::Arc;

use moe_comm::ThreadWorld;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::Execution;
use moe_model::config::ModelConfig;

pub use error::EvalError;
pub use text::{Document, Text};

use crate::Result;
use crate::checkpoint::Weights;
use crate::config::ParallelConfig;
use crate::passes::{DEADLINE, Passes};
use crate::run::threads;
use windows::{Packed, pack};

/// How texts are evaluated.
#[derive(Debug, Clone)]
pub struct Options {
    /// How ranks are folded.
    pub parallel: ParallelConfig,
    /// Tokens that a model sees before a prediction, at most: S.
    pub sequence_length: usize,
}

/// How well a text was predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Documents with text.
    pub documents: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Tokens that were predicted: all but the first of each document.
    pub tokens: u64,
    /// Sum of the negative log-likelihood of these, nats.
    pub nll: f64,
}

impl Perplexity {
    /// Mean negative log-likelihood, nats per predicted token.
    pub fn loss(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// Its exponential.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    /// Bits per byte of text, those of first tokens included.
    pub fn bits_per_byte(&self) -> f64 {
        self.nll / std::f64::consts::LN_2 / self.bytes as f64
    }
}

impl Sum for Perplexity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Perplexity::default(), |sum, one| Perplexity {
            documents: sum.documents + one.documents,
            bytes: sum.bytes + one.bytes,
            tokens: sum.tokens + one.tokens,
            nll: sum.nll + one.nll,
        })
    }
}

/// Positions that make up a micro-batch, if one sequence has not as many.
const POSITIONS: usize = 2048;

/// Texts under a folding, the same on all ranks.
#[derive(Debug)]
struct Plan {
    passes: Passes,
    texts: Vec<Vec<Packed>>,
}

impl Plan {
    fn new(model: &ModelConfig, texts: &[Text], options: &Options) -> Result<Self> {
        let sequence_length = options.sequence_length;
        if sequence_length == 0 {
            return Err(EvalError::SequenceLength.into());
        }
        for text in texts {
            text.check(model.vocab_size)?;
        }
        let texts: Vec<Vec<Packed>> =
            texts.iter().map(|text| pack(&text.documents, sequence_length)).collect();
        let longest = texts.iter().flatten().map(Packed::len).max().unwrap_or(1);
        let most = texts.iter().map(Vec::len).max().unwrap_or(1);
        let execution = Execution { dispatcher: options.parallel.dispatcher.into(), ..Execution::default() };
        let batch = |length: usize, dp: usize| (POSITIONS / length).clamp(1, most.div_ceil(dp).max(1));
        let passes = Passes::new(without_losses(model), &options.parallel, execution, longest, batch)?;
        Ok(Plan { passes, texts })
    }
}

/// `model` without what its routers add to the loss in training.
fn without_losses(model: &ModelConfig) -> ModelConfig {
    ModelConfig {
        router_aux_loss_coef: None,
        router_aux_losses: Vec::new(),
        router_z_loss_coef: 0.0,
        ..model.clone()
    }
}

/// How well the model of `weights` predicts each of `texts`, computed in `T`, with ranks as threads.
///
/// # Errors
/// A text has no token to predict, or one that is none of the model; the folding is illegal for the model; the weights are
/// damaged; a rank fails; a loss is not finite.
pub fn perplexity<T: Float>(
    weights: &Arc<Weights>,
    texts: &[Text],
    options: &Options,
) -> Result<Vec<Perplexity>>
where
    Cpu: Backend<T>,
{
    let plan = Arc::new(Plan::new(weights.model(), texts, options)?);
    let world_size = plan.passes.folding.world_size();
    let threads = threads(world_size);
    let ranks = {
        let weights = weights.clone();
        ThreadWorld::run(world_size, DEADLINE, move |world| {
            rank::run::<T, Cpu>(&plan, &weights, &world, Cpu::new(threads))
        })?
    };
    let measured = texts.iter().enumerate().map(|(i, text)| {
        let nll = ranks.iter().map(|sums| sums[i]).sum::<f64>();
        let documents = || text.documents.iter().filter(|document| document.bytes > 0);
        match nll.is_finite() {
            true => Ok(Perplexity {
                documents: documents().count() as u64,
                bytes: documents().map(|document| document.bytes as u64).sum(),
                tokens: documents().map(|document| document.predicted() as u64).sum(),
                nll,
            }),
            false => Err(EvalError::NotFinite { path: text.path.clone() }.into()),
        }
    });
    measured.collect()
}
