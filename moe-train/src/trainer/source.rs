//! Where micro-batches come from.

use moe_kernels::{Device, Float};
use moe_model::MicroBatch;
use moe_model::context::positions;

use crate::Result;

/// One training sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// `S + 1` tokens: inputs are the first `S`, targets the last `S`.
    pub tokens: Vec<u32>,
    /// `S` loss weights.
    pub weights: Vec<f64>,
}

impl Sequence {
    /// All targets count alike.
    pub fn unweighted(tokens: Vec<u32>) -> Self {
        let weights = vec![1.0; tokens.len().saturating_sub(1)];
        Sequence { tokens, weights }
    }
}

/// The global batch of a step, as micro-batches that do not depend on the mapping.
pub trait BatchSource {
    /// The sequences of micro-batch `u` (of `G_t / micro_batch_size`) of step `step` (from 1).
    fn micro_batch(&self, step: u64, u: usize) -> Result<Vec<Sequence>>;
}

/// One context-parallel rank's part of sequences in rows: sequence-major, so that its `s`-th token of sequence `b` is row
/// `s · batch + b`.
#[derive(Debug)]
pub(crate) struct HostBatch {
    batch: usize,
    first_sequence: u64,
    ids: Vec<i32>,
    positions: Vec<i32>,
    labels: Vec<i32>,
    weights: Vec<f64>,
}

impl HostBatch {
    /// The part of rank `rank` of `cp`. All sequences must have the same length; the index of the first one is
    /// `first_sequence`.
    pub fn new(sequences: &[Sequence], first_sequence: u64, cp: usize, rank: usize) -> Result<Self> {
        let batch = sequences.len();
        let seq_len = sequences.first().map_or(0, |s| s.weights.len());
        let capacity = batch * seq_len / cp;
        let mut rows = HostBatch {
            batch,
            first_sequence,
            ids: Vec::with_capacity(capacity),
            positions: Vec::with_capacity(capacity),
            labels: Vec::with_capacity(capacity),
            weights: Vec::with_capacity(capacity),
        };
        for position in positions(seq_len, cp, rank)? {
            for sequence in sequences {
                rows.ids.push(sequence.tokens[position] as i32);
                rows.positions.push(position as i32);
                rows.labels.push(sequence.tokens[position + 1] as i32);
                rows.weights.push(sequence.weights[position]);
            }
        }
        Ok(rows)
    }

    /// Sum of the loss weights.
    pub fn total_weight(&self) -> f64 {
        self.weights.iter().sum()
    }

    /// On the device; `total_weight` is that of the whole step.
    pub fn upload<T: Float, D: Device>(&self, device: &D, total_weight: f64) -> Result<MicroBatch<T, D>> {
        let mut batch = MicroBatch::new(
            device,
            self.batch,
            &self.ids,
            &self.positions,
            &self.labels,
            &self.weights,
            total_weight,
        )?;
        batch.first_sequence = self.first_sequence;
        Ok(batch)
    }
}
