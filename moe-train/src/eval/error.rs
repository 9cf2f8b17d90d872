//! Why a text cannot be evaluated.

use std::path::PathBuf;

/// Why a text cannot be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// Windows have no tokens.
    #[error("sequence_length = 0, but a window must have at least one token")]
    SequenceLength,
    /// Neither a model of the hub nor a run says what the model's context is.
    #[error("{} does not say how many tokens the model sees: give it with --sequence-length", path.display())]
    NoContext {
        /// The weights.
        path: PathBuf,
    },
    /// There is nothing to evaluate on.
    #[error("--text is needed: {} belongs to no run, whose held-out tokens could be taken", path.display())]
    NoText {
        /// The weights.
        path: PathBuf,
    },
    /// A file has no text.
    #[error("{} has no text", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// No document has two tokens.
    #[error("{} has no document of two tokens or more: the first of a document is not predicted", path.display())]
    NothingToPredict {
        /// The file.
        path: PathBuf,
    },
    /// A token is not in the vocabulary of the model.
    #[error(
        "{}: document {document} has the token {token}, but the model has {vocab_size}: the tokenizer is that of another model",
        path.display()
    )]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// The document, from 0.
        document: usize,
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The weights give no likelihood.
    #[error("the loss on {} is not finite", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
    },
}
