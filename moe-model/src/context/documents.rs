//! Documents that are packed into one sequence and do not see each other.

use moe_kernels::{Device, Tensor};
use moe_topology::{Attention, Folding};

use super::{positions, zigzag};
use crate::Result;

/// Where the documents of a micro-batch lie, as one rank needs it: attention sees the keys of a query's own document only, and
/// rotary positions start anew in each.
#[derive(Debug)]
pub struct Documents<D: Device> {
    /// Position of each token in its document, `[1, seq_len · batch]`, rows as in the micro-batch.
    pub positions: Tensor<i32, D>,
    /// For each step of the ring, `[1, q_len · batch]`: the first key of each query's document among the keys that are here in
    /// that step, counted in the order in which their holder has them.
    pub first_keys: Vec<Tensor<i32, D>>,
}

impl<D: Device> Documents<D> {
    /// `starts[s · batch + b]` is the position at which the document of position `s` of sequence `b` starts, for the whole
    /// sequence.
    ///
    /// # Errors
    /// [`Error::Chunks`](crate::Error::Chunks) if the sequence cannot be cut into `2·cp` equal chunks; errors of the device.
    pub fn new(device: &D, batch: usize, starts: &[i32], folding: &Folding, rank: usize) -> Result<Self> {
        let seq_len = starts.len() / batch.max(1);
        let place = |axes| (folding.size(axes), folding.coordinate(rank, axes));
        let ((cp, c), (ring, group)) = (place(Attention::CP), place(Attention::CP_OUTER));
        let rows = |s: usize| (s * batch..(s + 1) * batch).map(move |row| (s, starts[row]));
        let row = |values: Vec<i32>| Ok(Tensor::from_slice(device, 1, values.len(), &values)?);

        let own = positions(seq_len, cp, c)?.flat_map(rows);
        let restarted = row(own.map(|(s, start)| s as i32 - start).collect())?;
        let queries: Vec<i32> =
            positions(seq_len, ring, group)?.flat_map(rows).map(|(_, start)| start).collect();
        let first_keys = (0..ring).map(|step| {
            let holder = (group + ring - step) % ring;
            row(queries.iter().map(|&start| held_before(start, seq_len, ring, holder)).collect())
        });
        Ok(Documents { positions: restarted, first_keys: first_keys.collect::<Result<_>>()? })
    }
}

/// How many of the positions before `start` one of `ranks` ranks holds: the index of the first one from there on.
fn held_before(start: i32, seq_len: usize, ranks: usize, holder: usize) -> i32 {
    let first = |chunk: usize| (chunk * seq_len / (2 * ranks)) as i32;
    let before = |chunk: usize| start.clamp(first(chunk), first(chunk + 1)) - first(chunk);
    zigzag(ranks, holder).into_iter().map(before).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_is_the_one_that_the_holder_has_from_there_on() {
        for ranks in 1..5 {
            let seq_len = 2 * ranks * 3;
            for holder in 0..ranks {
                let held: Vec<usize> = positions(seq_len, ranks, holder).unwrap().collect();
                for start in 0..=seq_len {
                    let want = held.iter().filter(|&&position| position < start).count();
                    assert_eq!(
                        held_before(start as i32, seq_len, ranks, holder),
                        want as i32,
                        "{start} of {held:?}"
                    );
                }
            }
        }
        assert_eq!(held_before(4, 7, 1, 0), 4, "one rank holds sequences of any length");
    }
}
