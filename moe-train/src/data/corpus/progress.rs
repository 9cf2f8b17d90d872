//! How far it is.

use std::sync::atomic::{AtomicU64, Ordering};

/// What is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Documents become tokens.
    Encode,
    /// Parts become one file.
    Join,
}

/// How far a corpus is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// Parts that are complete, or joined.
    pub parts: usize,
    /// All parts.
    pub all_parts: usize,
    /// Documents that were read.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Bytes of the inputs that were read, or were before.
    pub bytes: u64,
    /// Bytes of those parts that were there from before.
    pub kept_bytes: u64,
    /// Bytes of all parts. Of Parquet they are those of the column in its compression.
    pub all_bytes: u64,
}

/// What all threads count.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub documents: AtomicU64,
    pub empty_documents: AtomicU64,
    pub tokens: AtomicU64,
    pub bytes: AtomicU64,
    pub kept_bytes: AtomicU64,
    pub kept_parts: AtomicU64,
    pub damaged_parts: AtomicU64,
}

impl Counters {
    /// Counts documents, or part of their bytes.
    pub fn add(counter: &AtomicU64, n: u64) {
        // Nothing else is read on the strength of a counter.
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
