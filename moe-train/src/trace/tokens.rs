//! The tokens of a batch.

use std::fs;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::TraceError;
use crate::Result;
use crate::durable::Context;
use crate::trainer::Sequence;

/// The tokens that are traced, `[batch, length]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Sequences, B.
    pub batch: usize,
    /// Tokens of each, S.
    pub length: usize,
    /// Row by row.
    pub ids: Vec<i64>,
}

impl Tokens {
    /// Reads `input_ids`, `[batch, seq]` of 64-bit integers, from a safetensors file.
    ///
    /// # Errors
    /// The file cannot be read or has no such tensor.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |what: String| TraceError::Tokens { path: path.to_owned(), what };
        let bytes = fs::read(path).context("read", path).map_err(TraceError::Io)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
        let ids = file.tensor("input_ids").map_err(|error| refuse(error.to_string()))?;
        match (ids.dtype(), ids.shape()) {
            (Dtype::I64, &[batch, length]) => {
                let ids = ids.data().chunks_exact(8).map(bytemuck::pod_read_unaligned).collect();
                Ok(Tokens { batch, length, ids })
            }
            (dtype, shape) => {
                Err(refuse(format!("input_ids is {dtype:?} {shape:?}, but must be I64 [batch, seq]")).into())
            }
        }
    }

    /// That a model of `vocab_size` tokens can be traced on them.
    pub(super) fn check(&self, vocab_size: usize) -> std::result::Result<(), TraceError> {
        let &Tokens { batch, length, ref ids } = self;
        if batch == 0 || length < 2 {
            return Err(TraceError::TooShort { batch, length });
        }
        let known = |&token: &i64| usize::try_from(token).is_ok_and(|token| token < vocab_size);
        match ids.iter().position(|token| !known(token)) {
            None => Ok(()),
            Some(at) => {
                let (sequence, position, token) = (at / length, at % length, ids[at]);
                Err(TraceError::Vocabulary { sequence, position, token, vocab_size })
            }
        }
    }

    /// Sequence `index`, filled up to `length` positions: all of it padding, if there is none of that index. Every token
    /// but the last is the input whose target is the next one.
    pub(super) fn sequence(&self, index: usize, length: usize) -> Sequence {
        let own = self.ids.chunks_exact(self.length).nth(index).unwrap_or_default();
        let mut tokens: Vec<u32> = own.iter().map(|&token| token as u32).collect();
        tokens.resize(length + 1, 0);
        let mut weights = vec![1.0; own.len().saturating_sub(1)];
        weights.resize(length, 0.0);
        Sequence::new(tokens, weights).padded(length - own.len())
    }
}
