//! Why a text cannot be continued.

use std::path::PathBuf;

/// Why a text cannot be continued.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// A setting is out of range.
    #[error("{name} = {value}, but {name} must be {allowed}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// The range, in words that follow "must be".
        allowed: &'static str,
    },
    /// There is nothing that a first token could follow.
    #[error("the prompt has no tokens: give at least one")]
    EmptyPrompt,
    /// A token of the prompt is none of the model.
    #[error(
        "token {token} of the prompt is none of the model's {vocab_size}: the tokenizer is that of another model"
    )]
    Vocabulary {
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The logits are not numbers that a token could be chosen by.
    #[error("the logits after {position} tokens are not finite")]
    NotFinite {
        /// Tokens before the choice.
        position: usize,
    },
    /// Nothing says how text becomes tokens of this model.
    #[error("{} has no tokenizer: name one with --tokenizer (a tokenizer.json, its folder, or byte)", path.display())]
    NoTokenizer {
        /// The weights.
        path: PathBuf,
    },
    /// A file of generation settings or configuration says something else than a token or tokens.
    #[error("{}: eos_token_id is {value}, which is no token and no list of tokens", path.display())]
    EosTokenId {
        /// The file.
        path: PathBuf,
        /// What it says.
        value: String,
    },
}
