//! Documents as sequences.

use super::Document;
use crate::trainer::Sequence;

/// Windows that share a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packed {
    /// Their tokens; the last one is a target alone.
    tokens: Vec<u32>,
    /// Where each of them starts but the first.
    starts: Vec<usize>,
}

/// Cuts each document into windows of up to `length` tokens that the model sees and the one after each of them, which it
/// predicts; the next window starts with the last target. As many windows as fit in a row, in order, share a sequence.
pub(super) fn pack(documents: &[Document], length: usize) -> Vec<Packed> {
    let mut sequences: Vec<Packed> = Vec::new();
    for document in documents {
        let predicted = document.predicted();
        for first in (0..predicted).step_by(length) {
            let window = &document.tokens[first..=first.saturating_add(length).min(predicted)];
            match sequences.last_mut() {
                Some(last) if last.len() + window.len() <= length => {
                    last.starts.push(last.tokens.len());
                    last.tokens.extend(window);
                }
                _ => sequences.push(Packed { tokens: window.to_vec(), starts: Vec::new() }),
            }
        }
    }
    sequences
}

impl Packed {
    /// Tokens that the model sees.
    pub fn len(&self) -> usize {
        self.tokens.len() - 1
    }

    /// Filled up to `length` positions, each window a document of its own.
    pub fn sequence(&self, length: usize) -> Sequence {
        let mut tokens = self.tokens.clone();
        tokens.resize(length + 1, 0);
        Sequence::unweighted(tokens).separated(self.starts.iter().copied()).padded(length - self.len())
    }
}

/// A sequence of `length` positions of which none counts.
pub(super) fn padding(length: usize) -> Sequence {
    Sequence::unweighted(vec![0; length + 1]).padded(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(lengths: &[u32]) -> Vec<Document> {
        let tokens = |&n: &u32| (0..n).map(|i| 10 * n + i).collect();
        lengths.iter().map(|n| Document { tokens: tokens(n), bytes: 1 }).collect()
    }

    /// What is predicted of which document after how many of its tokens, by the sequences themselves.
    fn predictions(sequences: &[Packed], length: usize) -> Vec<(u32, usize)> {
        let mut seen = Vec::new();
        for packed in sequences {
            let Sequence { tokens, weights, documents, padding } = packed.sequence(length);
            assert_eq!((tokens.len(), weights.len()), (length + 1, length));
            for position in (0..length - padding).filter(|&position| weights[position] > 0.0) {
                let start = documents.iter().rev().find(|&&start| start <= position).unwrap_or(&0);
                assert_eq!(tokens[position] / 10, tokens[position + 1] / 10, "of two documents");
                assert_eq!(tokens[position] + 1, tokens[position + 1], "not the next token");
                seen.push((tokens[position + 1], position + 1 - start));
            }
        }
        seen
    }

    #[test]
    fn every_token_but_the_first_is_predicted_once_after_those_of_its_window() {
        let lengths = [9, 1, 2, 4, 5, 3, 8, 0];
        for length in 1..12 {
            let packed = pack(&documents(&lengths), length);
            let want: Vec<(u32, usize)> = lengths
                .iter()
                .flat_map(|&n| (1..n).map(move |i| (10 * n + i, (i as usize - 1) % length + 1)))
                .collect();
            assert_eq!(predictions(&packed, length), want, "{length}");
            assert_eq!(predictions(&packed, length + 3), want, "{length}, padded");
            assert!(packed.iter().all(|packed| packed.len() <= length));
        }
        // All in one: the last token needs no position.
        let tokens: u32 = lengths.iter().filter(|&&n| n > 1).sum();
        assert_eq!(pack(&documents(&lengths), tokens as usize - 1).len(), 1);
        assert_eq!(pack(&documents(&lengths), tokens as usize - 2).len(), 2);
        assert_eq!(pack(&documents(&lengths), usize::MAX).len(), 1);
    }

    #[test]
    fn documents_without_text_have_no_window() {
        let mut documents = documents(&[4, 4]);
        documents[0].bytes = 0;
        let packed = pack(&documents, 9);
        assert_eq!(packed, [Packed { tokens: vec![40, 41, 42, 43], starts: vec![] }]);
    }
}
