//! Where micro-batches come from.

use moe_kernels::{Device, Float, Tensor};
use moe_model::MicroBatch;
use moe_model::context::{Documents, positions};
use moe_topology::{Attention, Folding};

use crate::Result;

/// One training sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// `S + 1` tokens: inputs are the first `S`, targets the last `S`.
    pub tokens: Vec<u32>,
    /// `S` loss weights.
    pub weights: Vec<f64>,
    /// Ascending positions of the inputs, from 1, where documents start that see nothing of those before them. None: the
    /// whole sequence is one.
    pub documents: Vec<usize>,
    /// Inputs at the end that are padding: neither routed nor counted, seen by no other token, of weight 0 whatever
    /// [`weights`](Self::weights) says.
    pub padding: usize,
}

impl Sequence {
    /// One document.
    pub fn new(tokens: Vec<u32>, weights: Vec<f64>) -> Self {
        Sequence { tokens, weights, documents: Vec::new(), padding: 0 }
    }

    /// All targets count alike.
    pub fn unweighted(tokens: Vec<u32>) -> Self {
        let weights = vec![1.0; tokens.len().saturating_sub(1)];
        Self::new(tokens, weights)
    }

    /// Separates the documents that start at `starts`, ascending positions of the tokens: attention and positions start anew
    /// there, and an input whose target is in another document has weight 0.
    #[must_use]
    pub fn separated(mut self, starts: impl IntoIterator<Item = usize>) -> Self {
        for start in starts.into_iter().filter(|&start| start > 0) {
            if let Some(weight) = self.weights.get_mut(start - 1) {
                *weight = 0.0;
            }
            if start < self.weights.len() {
                self.documents.push(start);
            }
        }
        self
    }

    /// Makes padding of the last `padding` inputs.
    #[must_use]
    pub fn padded(self, padding: usize) -> Self {
        Sequence { padding, ..self }
    }

    /// Inputs that are no padding.
    fn valid(&self) -> usize {
        self.weights.len().saturating_sub(self.padding)
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
    /// 0 for padding.
    valid: Vec<i32>,
    /// Whether any of the sequences has padding, on whichever rank.
    padded: bool,
    /// For all positions of all sequences, where their document starts; none if no sequence has several.
    starts: Option<Vec<i32>>,
}

impl HostBatch {
    /// The part of `rank` of the folding. All sequences must have the same length; the index of the first one is
    /// `first_sequence`.
    pub fn new(sequences: &[Sequence], first_sequence: u64, folding: &Folding, rank: usize) -> Result<Self> {
        let (cp, rank) = (folding.size(Attention::CP), folding.coordinate(rank, Attention::CP));
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
            valid: Vec::with_capacity(capacity),
            padded: sequences.iter().any(|sequence| sequence.padding > 0),
            starts: document_starts(sequences, seq_len),
        };
        for position in positions(seq_len, cp, rank)? {
            for sequence in sequences {
                rows.ids.push(sequence.tokens[position] as i32);
                rows.positions.push(position as i32);
                rows.labels.push(sequence.tokens[position + 1] as i32);
                let valid = position < sequence.valid();
                rows.weights.push(if valid { sequence.weights[position] } else { 0.0 });
                rows.valid.push(i32::from(valid));
            }
        }
        Ok(rows)
    }

    /// Sum of the loss weights.
    pub fn total_weight(&self) -> f64 {
        self.weights.iter().sum()
    }

    /// Tokens that are no padding.
    pub fn valid_tokens(&self) -> usize {
        self.valid.iter().filter(|&&valid| valid != 0).count()
    }

    /// On the device of `rank`; `total_weight` is that of the whole step.
    pub fn upload<T: Float, D: Device>(
        &self,
        device: &D,
        total_weight: f64,
        folding: &Folding,
        rank: usize,
    ) -> Result<MicroBatch<T, D>> {
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
        if self.padded {
            batch.valid = Some(Tensor::from_slice(device, 1, self.valid.len(), &self.valid)?);
        }
        let documents = |starts: &Vec<i32>| Documents::new(device, self.batch, starts, folding, rank);
        batch.documents = self.starts.as_ref().map(documents).transpose()?;
        Ok(batch)
    }
}

/// The start of the document of every position, sequence-major, if any sequence has several documents or padding, of
/// which every token is a document of its own.
fn document_starts(sequences: &[Sequence], seq_len: usize) -> Option<Vec<i32>> {
    if sequences.iter().all(|sequence| sequence.documents.is_empty() && sequence.padding == 0) {
        return None;
    }
    let mut starts = vec![0; seq_len * sequences.len()];
    for (b, sequence) in sequences.iter().enumerate() {
        let ends = sequence.documents.iter().skip(1).copied().chain([seq_len]);
        let ends = ends.map(|end| end.min(seq_len));
        for (&start, end) in sequence.documents.iter().zip(ends) {
            for position in start..end {
                starts[position * sequences.len() + b] = start as i32;
            }
        }
        for position in sequence.valid()..seq_len {
            starts[position * sequences.len() + b] = position as i32;
        }
    }
    Some(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_separated_where_they_start() {
        let whole = Sequence::unweighted((0..9).collect());
        let cut = whole.clone().separated([0, 1, 4, 5, 8]);
        assert_eq!(cut.tokens, whole.tokens);
        assert_eq!(cut.weights, [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(cut.documents, [1, 4, 5]);
        assert_eq!(whole.clone().separated([0]), whole);

        assert_eq!(document_starts(&[whole.clone(), whole.clone()], 8), None);
        let starts = document_starts(&[cut, whole], 8).unwrap();
        let (first, second): (Vec<i32>, Vec<i32>) = starts.chunks(2).map(|row| (row[0], row[1])).unzip();
        assert_eq!(first, [0, 1, 1, 1, 4, 5, 5, 5]);
        assert_eq!(second, [0; 8]);
    }

    #[test]
    fn padding_sees_itself_alone_and_weighs_nothing() {
        let whole = Sequence::unweighted((0..9).collect());
        let padded = whole.clone().separated([3]).padded(2);
        let folding = Folding::new(moe_topology::Mapping::default()).unwrap();
        let batch = HostBatch::new(&[padded, whole.padded(8)], 0, &folding, 0).unwrap();
        assert_eq!((batch.valid_tokens(), batch.total_weight()), (6, 5.0));
        let of = |values: &[i32], b: usize| values.iter().skip(b).step_by(2).copied().collect::<Vec<_>>();
        assert_eq!(of(&batch.valid, 0), [1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(of(batch.starts.as_ref().unwrap(), 0), [0, 0, 0, 3, 3, 3, 6, 7]);
        assert_eq!(of(&batch.valid, 1), [0; 8]);
        assert_eq!(of(batch.starts.as_ref().unwrap(), 1), [0, 1, 2, 3, 4, 5, 6, 7]);
    }
}
