//! From text files to the sequences of a step.
//!
//! Text is found by patterns, cut into documents, tokenised, and written to two [token files](token_file): one to train
//! on, one of held-out documents. [Prompts with completions](prepare_completions()) become token files with a mask. A [`Corpus`]
//! is more than that: text, JSON lines and Parquet, in parallel, to any format.
//! [`Tokens`] from elsewhere are read where they are, [Megatron's indexed datasets](megatron), or [imported](import_nanogpt).
//! A [`Dataset`] reads tokens as samples of up to `S + 1`; a [`Sampler`] says which samples make up which micro-batch of
//! which step. Both know nothing of the mapping.

mod batch_sizes;
mod blend;
mod completions;
mod corpus;
mod cut;
mod dataset;
mod documents;
mod entropy;
mod error;
mod json;
mod map;
pub mod megatron;
mod nanogpt;
mod permutation;
mod prepare;
mod sampler;
pub mod token_file;
mod tokenizer;
mod tokens;
mod writer;

pub use batch_sizes::{BatchSizes, RampUp, RampUpError};
pub use blend::{Blend, BlendError, CYCLE, Place, quotas};
pub use completions::prepare_completions;
pub use corpus::{Corpus, InputFormat, PreparedCorpus, Progress, Stage};
pub use cut::MAX_DOCUMENT_BYTES;
pub use dataset::Dataset;
pub use documents::Documents;
pub use entropy::unigram_entropy;
pub use error::DataError;
pub(crate) use json::string_field;
pub use megatron::{MegatronFile, MegatronWriter};
pub use nanogpt::{Imported, import_nanogpt};
pub use permutation::Permutation;
pub use prepare::{Prepared, find_files, prepare};
pub use sampler::{Order, Sampler};
pub use token_file::{TokenFile, TokenFileWriter};
#[cfg(feature = "tokenizers")]
pub use tokenizer::HubTokenizer;
pub use tokenizer::{Encoder, EosToken, EosTokenId, TextStream, TokenizeError, Tokenizer, TokenizerKind};
pub use tokens::{Tokens, Verified};
pub use writer::{DocumentFormat, DocumentWriter};
