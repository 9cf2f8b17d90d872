//! What tells tokens apart whichever rank holds them, and the keys of what is random for them.

use moe_kernels::{Device, Float};
use moe_topology::{Attention, Folding};

use crate::capacity::Place;
use crate::context::positions;
use crate::{MicroBatch, Result};

/// A token of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenId {
    /// Index of its sequence among all of the run, g.
    pub sequence: u64,
    /// Position in the sequence.
    pub position: usize,
}

/// The tokens of this rank's rows of a micro-batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// In the order of rows.
    pub tokens: Vec<TokenId>,
    /// Tokens of a whole sequence, S.
    pub seq_len: usize,
}

impl TokenIds {
    /// The tokens of a micro-batch on a rank of `folding`, as its layers with experts see them: of its part over CP, its
    /// part over TP.
    ///
    /// # Errors
    /// The sequences cannot be cut so.
    pub fn of_rank<T: Float, D: Device>(
        folding: &Folding,
        rank: usize,
        batch: &MicroBatch<T, D>,
    ) -> Result<Self> {
        let rows = batch.seq_len * batch.batch / folding.size(Attention::TP);
        Place::of(folding, rank).tokens(batch, rows)
    }

    /// `g·S + position` of each token.
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        let len = self.seq_len as u64;
        self.tokens.iter().map(move |t| t.sequence.wrapping_mul(len).wrapping_add(t.position as u64))
    }
}

impl Place {
    /// The tokens of this rank's `rows` rows of a micro-batch.
    pub fn tokens<T: Float, D: Device>(self, batch: &MicroBatch<T, D>, rows: usize) -> Result<TokenIds> {
        let ((tp_rank, _), (cp_rank, cp)) = (self.tp, self.cp);
        let seq_len = batch.seq_len * cp;
        let (first, sequences) = (batch.first_sequence, batch.batch as u64);
        let of_position =
            |position| (0..sequences).map(move |b| TokenId { sequence: first.wrapping_add(b), position });
        let tokens = positions(seq_len, cp, cp_rank)?.flat_map(of_position).skip(tp_rank * rows).take(rows);
        Ok(TokenIds { tokens: tokens.collect(), seq_len })
    }
}

/// The key of what is random in one layer and step: the first 64 bits of BLAKE3(seed ‖ step ‖ layer ‖ purpose), numbers as
/// eight little-endian bytes.
pub fn random_key(seed: u64, step: u64, layer: usize, purpose: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for number in [seed, step, layer as u64] {
        hasher.update(&number.to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.update(purpose.as_bytes()).finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use moe_kernels::Cpu;
    use moe_topology::Mapping;

    use super::*;

    #[test]
    fn every_token_is_known_on_one_rank_under_any_mapping() {
        let (batch, seq_len, first) = (3, 24, 70);
        for (tp, cp) in [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)] {
            let folding =
                Folding::new(Mapping { world_size: tp * cp, tp, cp, ..Mapping::default() }).unwrap();
            let mut seen = BTreeSet::new();
            for rank in 0..tp * cp {
                let own = vec![0; batch * seq_len / cp];
                let weights = vec![0.0; own.len()];
                let mut own =
                    MicroBatch::<f64, _>::new(&Cpu::new(1), batch, &own, &own, &own, &weights, 0.0).unwrap();
                own.first_sequence = first;
                let rows = batch * seq_len / (tp * cp);
                let ids = TokenIds::of_rank(&folding, rank, &own).unwrap();
                assert_eq!((ids.tokens.len(), ids.seq_len), (rows, seq_len));
                // Sequence-major.
                assert!(
                    ids.tokens.chunks(batch).all(|row| row.iter().all(|t| t.position == row[0].position))
                );
                seen.extend(ids.numbers());
            }
            assert!(seen.into_iter().eq(70 * 24..73 * 24), "tp {tp}, cp {cp}");
        }
    }

    #[test]
    fn keys_depend_on_everything() {
        let keys = [(1, 2, 3, "a"), (2, 2, 3, "a"), (1, 3, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b")];
        let keys = keys.map(|(seed, step, layer, purpose)| random_key(seed, step, layer, purpose));
        assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), 5);
        assert_eq!(random_key(1, 2, 3, "a"), keys[0]);
    }
}
