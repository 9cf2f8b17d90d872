//! Why data was refused.

use std::path::PathBuf;

use super::{TokenizeError, megatron, token_file};
use crate::durable::IoError;

/// Why data was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A pattern of `data.files` is malformed.
    #[error("pattern \"{pattern}\" in data.files: {message}")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        message: String,
    },
    /// A pattern of `data.files` finds nothing.
    #[error("pattern \"{pattern}\" in data.files matches no file (the current folder is {})", folder.display())]
    NoMatch {
        /// The pattern.
        pattern: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A text file has no bytes.
    #[error("{} is empty: remove it or exclude it from data.files", path.display())]
    EmptyText {
        /// The file.
        path: PathBuf,
    },
    /// A file is no `tokenizer.json`, or what is beside it is malformed.
    #[error("{} is no tokenizer: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// This program was built without what reads a file.
    #[error("{} cannot be read: this program was built without the feature `{feature}`", path.display())]
    Feature {
        /// The file.
        path: PathBuf,
        /// The feature of this crate.
        feature: &'static str,
    },
    /// It is not known which token ends a document.
    #[error(
        "no token that ends a document: the tokenizer {what}; name one that it has, by number or as written, or \"none\" \
         (--eos or data.eos_token)"
    )]
    EosToken {
        /// What the tokenizer has, or has not.
        what: String,
    },
    /// A document cannot be tokenised.
    #[error("{}: {source}", path.display())]
    Tokenize {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: TokenizeError,
    },
    /// A text file changed while it was read.
    #[error("{} changed while it was read: run again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing left to train on when a document is held out.
    #[error(
        "data.files has only one document ({} bytes), and whole documents are held out: give more files, or one \
         of more than {} bytes",
        bytes,
        super::MAX_DOCUMENT_BYTES
    )]
    OneDocument {
        /// Its size.
        bytes: u64,
    },
    /// A token file is damaged or foreign.
    #[error("token file {}: {fault}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: token_file::Fault,
    },
    /// There is nothing to read at a path.
    #[error("{}: there is no token file of that name, nor a .bin and an .idx", path.display())]
    NoTokens {
        /// The path.
        path: PathBuf,
    },
    /// A file is none of nanoGPT's, or damaged.
    #[error("{}: {what}", path.display())]
    NanoGpt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file has more kinds of tokens than the model.
    #[error(
        "{} has a vocabulary of {vocab_size} tokens, more than the model's {model_vocab_size} (model.vocab_size)",
        path.display()
    )]
    LargeVocabulary {
        /// The file.
        path: PathBuf,
        /// Tokens of its vocabulary.
        vocab_size: u64,
        /// Those of the model's.
        model_vocab_size: u64,
    },
    /// A token is not in the vocabulary of the model.
    #[error("{}: token {position} is {token}, but the model's vocabulary has {model_vocab_size} (model.vocab_size)", path.display())]
    ForeignToken {
        /// The file.
        path: PathBuf,
        /// Where, counted in tokens.
        position: u64,
        /// The token.
        token: u32,
        /// Tokens of the model's vocabulary.
        model_vocab_size: u64,
    },
    /// A file that says which tokens are learnt, where a stream is asked for.
    #[error(
        "{} has prompts with completions: set data.format = \"prompt-completion\", with which no stream of text can be blended",
        path.display()
    )]
    Masked {
        /// The file.
        path: PathBuf,
    },
    /// A file that does not say which tokens are learnt.
    #[error(
        "{} has no prompts with completions, but data.format = \"prompt-completion\" asks for them: remove one of the two",
        path.display()
    )]
    Unmasked {
        /// The file.
        path: PathBuf,
    },
    /// Files that one tokenizer cannot have made.
    #[error(
        "{} has a vocabulary of {vocab_size} tokens, but {} has one of {other_vocab_size}: they were not made by the same tokenizer",
        path.display(),
        other.display()
    )]
    Vocabularies {
        /// A file.
        path: PathBuf,
        /// Tokens of its vocabulary.
        vocab_size: u64,
        /// Another file.
        other: PathBuf,
        /// Those of the other one's.
        other_vocab_size: u64,
    },
    /// There are not two documents to part.
    #[error(
        "{} has {documents} documents, of which none can be held out: name other tokens in data.validation",
        path.display()
    )]
    NoSplit {
        /// The file.
        path: PathBuf,
        /// Its documents.
        documents: u64,
    },
    /// A sample was asked for that is not there.
    #[error("{}: there is no sample {i} of {len}", path.display())]
    NoSample {
        /// The file.
        path: PathBuf,
        /// The sample, from 0.
        i: u64,
        /// How many there are.
        len: u64,
    },
    /// A dataset in Megatron's format is damaged, foreign or of a kind that is not supported.
    #[error("Megatron dataset {}: {fault}", prefix.display())]
    Megatron {
        /// Its files without their extensions.
        prefix: PathBuf,
        /// What is wrong.
        fault: megatron::Fault,
    },
    /// The format does not take so many tokens in a document.
    #[error("{}: document {index} has more tokens than the format can count, {}", path.display(), i32::MAX)]
    LongSequence {
        /// The file.
        path: PathBuf,
        /// The document, from 0.
        index: u64,
    },
    /// The format does not take so many kinds of tokens.
    #[error("a vocabulary of {vocab_size} tokens, but the format takes at most {most}")]
    Vocabulary {
        /// Tokens of the vocabulary.
        vocab_size: u64,
        /// The most it can have.
        most: u64,
    },
    /// A file was completed in the middle of a document.
    #[error("{}: the last document was not ended", path.display())]
    OpenDocument {
        /// The file.
        path: PathBuf,
    },
    /// A token is not in the vocabulary of the file.
    #[error("token {token} is not below the vocabulary of {vocab_size}")]
    TokenTooLarge {
        /// The token.
        token: u32,
        /// Tokens of the vocabulary.
        vocab_size: u64,
    },
    /// A line of a file of prompts and completions is not one.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A file of documents is none that can be read.
    #[error("{}: {what}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A row of a column has no tokens.
    #[error("{}: row {row}, counted from 0: {source}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The row, from 0.
        row: u64,
        /// Why.
        source: TokenizeError,
    },
    /// Parts that are there are not of what is to be made.
    #[error(
        "{} has parts of {what}: give what they were begun with, or remove the folder to begin anew", folder.display()
    )]
    Parts {
        /// The folder.
        folder: PathBuf,
        /// What they are parts of.
        what: String,
    },
    /// Nothing is to be written.
    #[error("no document has a text ({empty} empty ones): nothing is written")]
    NoText {
        /// Documents without a text.
        empty: u64,
    },
    /// Stopped before its end.
    #[error("interrupted when {done} of {of} parts were complete: the same command goes on with them")]
    Interrupted {
        /// Complete parts.
        done: usize,
        /// All parts.
        of: usize,
    },
    /// There is nothing left to train on when a sample is held out.
    #[error("data.files has only one prompt with a completion, and whole ones are held out: give more")]
    OneSample,
    /// A document does not fit into a sequence.
    #[error(
        "{}: document {index} has {tokens} tokens, but a sequence takes at most {} (sequence_length + 1)",
        path.display(),
        sequence_length + 1
    )]
    LongDocument {
        /// The file.
        path: PathBuf,
        /// The document, from 0.
        index: u64,
        /// Its tokens.
        tokens: u64,
        /// Tokens of a sequence, S.
        sequence_length: usize,
    },
    /// Not even one sequence fits.
    #[error("{} has {tokens} tokens, but one sequence needs {} (sequence_length + 1)", path.display(), sequence_length + 1)]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        tokens: u64,
        /// Tokens of a sequence, S.
        sequence_length: usize,
    },
}
