//! Why a trace was refused.

use std::path::PathBuf;

use safetensors::SafeTensorError;

use crate::durable::IoError;

/// Why a trace was refused, or could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A file of tokens is none.
    #[error("{} is no file of tokens: {what}", path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A batch has no sequence, or sequences without a next token.
    #[error("input_ids is [{batch}, {length}], but must have at least one sequence of two tokens")]
    TooShort {
        /// Sequences.
        batch: usize,
        /// Tokens of each.
        length: usize,
    },
    /// A token is not in the vocabulary.
    #[error("input_ids[{sequence}, {position}] = {token}, but the model's vocabulary is 0 to {}", vocab_size - 1)]
    Vocabulary {
        /// The sequence.
        sequence: usize,
        /// The position.
        position: usize,
        /// The token.
        token: i64,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The result cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: SafeTensorError,
    },
}
