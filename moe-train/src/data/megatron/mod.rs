//! Megatron's indexed datasets: tokens in `PREFIX.bin`, where sequences and documents start in `PREFIX.idx`, as
//! `megatron/core/datasets/indexed_dataset.py` reads and writes them.
//!
//! `.bin` is the tokens of all sequences, one after the other, and nothing else. `.idx`, little-endian and packed:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 9 | magic `MMIDIDX`, two zeros |
//! | 9 | 8 | version, 1 |
//! | 17 | 1 | type of a token: 1 `uint8`, 2 `int8`, 3 `int16`, 4 `int32`, 5 `int64`, 8 `uint16`; 6 and 7, floating point, are refused |
//! | 18 | 8 | sequences, s |
//! | 26 | 8 | document indices, d: one more than documents |
//! | 34 | 4·s | `int32`: tokens of each sequence |
//! | | 8·s | `int64`: where each sequence starts in `.bin`, in bytes: the sum of those before it |
//! | | 8·d | `int64`: the first sequence of each document, from 0, and s at the end |
//! | | s | multimodal datasets only, which are refused: a mode per sequence |
//!
//! A document is one sequence unless it was cut into sentences; one without tokens has none. Megatron keeps no checksum:
//! [`MegatronWriter`] puts one beside them, `PREFIX.blake3.json`, which Megatron ignores.

mod checksums;
mod index;
mod read;
mod write;

use std::path::{Path, PathBuf};

pub use index::{MegatronDType, MegatronIndex};
pub use read::MegatronFile;
pub use write::MegatronWriter;

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
/// Bytes before the lengths of sequences.
const HEADER: usize = 34;

/// What is wrong with an indexed dataset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The index does not start as indices do.
    #[error("the .idx is no index (it does not start with \"MMIDIDX\")")]
    Foreign,
    /// Another version.
    #[error("the .idx has version {found}, which is not supported (this program reads version {VERSION})")]
    Version {
        /// The version.
        found: u64,
    },
    /// Tokens that are no integers.
    #[error("the .idx says that tokens have type {code}, which is none of 1 to 5 and 8 (integers)")]
    DType {
        /// Its code.
        code: u8,
    },
    /// The index is shorter or longer than its header says.
    #[error(
        "the .idx has {found} bytes, but {} were expected for {sequences} sequences and {document_indices} document indices: \
         it was cut off or extended",
        index_bytes(*sequences, *document_indices)
    )]
    IndexLength {
        /// Sequences.
        sequences: u64,
        /// Document indices.
        document_indices: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// A dataset of text and images.
    #[error("the .idx has a mode for each sequence: multimodal datasets are not supported")]
    Multimodal,
    /// A sequence of less than no tokens.
    #[error("the .idx says that sequence {sequence} has {length} tokens")]
    SequenceLength {
        /// The sequence, from 0.
        sequence: u64,
        /// Its length.
        length: i32,
    },
    /// A sequence does not start where the ones before it end.
    #[error(
        "the .idx says that sequence {sequence} starts at byte {found}, but those before it end at {expected}"
    )]
    Pointer {
        /// The sequence, from 0.
        sequence: u64,
        /// Where the ones before it end.
        expected: u64,
        /// Where it starts.
        found: i64,
    },
    /// The tokens are more or fewer than those of all sequences.
    #[error(
        "the .bin has {found} bytes, but {expected} were expected: it was cut off or extended, or is not of this .idx"
    )]
    BinLength {
        /// What the index says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// Document indices do not rise from the first sequence to behind the last.
    #[error(
        "the .idx says that document {document} starts at sequence {found}, but it must be from {from} to {to}"
    )]
    DocumentIndex {
        /// The document, from 0; that after the last one for the end.
        document: u64,
        /// The sequence.
        found: i64,
        /// The least that it can be: what the document before it says.
        from: i64,
        /// The most.
        to: i64,
    },
    /// There are no document indices, of which even an empty dataset has one.
    #[error("the .idx has no document indices")]
    NoDocumentIndices,
    /// A token that is none.
    #[error("token {position} is {value}, but it must be from 0 to 4294967295")]
    Token {
        /// Where, counted in tokens.
        position: u64,
        /// What it is.
        value: i64,
    },
    /// The file of checksums is not one.
    #[error("the .blake3.json is damaged: {what}")]
    Checksums {
        /// What is wrong with it.
        what: String,
    },
    /// A checksum is wrong.
    #[error("the .{file} is damaged (its checksum in .blake3.json is another)")]
    Content {
        /// `bin` or `idx`.
        file: &'static str,
    },
    /// A token or document was asked for that it does not have.
    #[error("{what} {start}..{end} of {len}")]
    OutOfRange {
        /// Tokens or documents.
        what: &'static str,
        /// The first one.
        start: u64,
        /// The one after the last.
        end: u64,
        /// How many there are.
        len: u64,
    },
}

/// The size of an index. Of numbers that no file can have too.
fn index_bytes(sequences: u64, document_indices: u64) -> u128 {
    HEADER as u128 + 12 * u128::from(sequences) + 8 * u128::from(document_indices)
}

/// A file of the dataset at `prefix`.
fn beside(prefix: &Path, extension: &str) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(extension);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests;
