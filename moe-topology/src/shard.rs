//! The part of a logical tensor that one rank stores, updates and writes.

use std::ops::Range;

use smallvec::SmallVec;

use crate::{Folding, Placement, View};

impl<V: View> Placement<V> {
    /// The indices that `rank` stores, per dimension: blocks of `ceil(n/size)`, of which the last are short or empty
    /// if `size` does not divide `n` (a vocabulary). Regardless of the stage: see [`holds`](Self::holds).
    #[must_use]
    pub fn slice(&self, folding: &Folding, rank: usize) -> SmallVec<[Range<usize>; 4]> {
        let mut slice: SmallVec<[Range<usize>; 4]> = self.dims().iter().map(|&dim| 0..dim).collect();
        for &(dim, axes) in self.shards() {
            let n = self.dims()[dim];
            let block = n.div_ceil(folding.size(axes));
            let start = folding.coordinate(rank, axes) * block;
            slice[dim] = start.min(n)..start.saturating_add(block).min(n);
        }
        slice
    }

    /// The shape of what `rank` stores.
    #[must_use]
    pub fn local_dims(&self, folding: &Folding, rank: usize) -> SmallVec<[usize; 4]> {
        self.slice(folding, rank).iter().map(ExactSizeIterator::len).collect()
    }

    /// The number of elements that `rank` stores.
    #[must_use]
    pub fn local_len(&self, folding: &Folding, rank: usize) -> usize {
        self.local_dims(folding, rank).iter().product()
    }

    /// The part of a flat buffer of `len` elements whose optimizer state is `rank`'s: equal blocks of `ceil(len/size)`
    /// over the [`cut_axes`](Self::cut_axes), as a reduce-scatter wants them.
    ///
    /// The last blocks may reach beyond `len`: the buffer must be padded to `size` blocks.
    #[must_use]
    pub fn zero_cut(&self, len: usize, folding: &Folding, rank: usize) -> Range<usize> {
        let block = len.div_ceil(folding.size(self.cut_axes()));
        let start = folding.coordinate(rank, self.cut_axes()) * block;
        start..start.saturating_add(block)
    }

    /// Where the elements `part` of what `rank` stores (flat, row-major) stand in the logical tensor: maximal stretches
    /// that are contiguous in both, ascending. For initial values and for files.
    ///
    /// What of `part` lies beyond [`local_len`](Self::local_len) is padding and has no place.
    ///
    /// ```
    /// use moe_topology::{Attention, Axes, Folding, Mapping, Owner, Placement, Run};
    ///
    /// let folding = Folding::new(Mapping { world_size: 2, tp: 2, ..Mapping::default() })?;
    /// let row_parallel = Placement::new(&[3, 4], &[(1, Attention::TP)], Axes::NONE, Owner::Stage(0))?;
    /// let runs: Vec<_> = row_parallel.runs(&folding, 1, 1..6).collect();
    /// assert_eq!(runs, [
    ///     Run { local: 1, global: 3, len: 1 },
    ///     Run { local: 2, global: 6, len: 2 },
    ///     Run { local: 4, global: 10, len: 2 },
    /// ]);
    /// # Ok::<(), moe_topology::Error>(())
    /// ```
    pub fn runs(
        &self,
        folding: &Folding,
        rank: usize,
        part: Range<usize>,
    ) -> impl Iterator<Item = Run> + use<V> {
        let slice = self.slice(folding, rank);
        let dims: SmallVec<[usize; 4]> = self.dims().into();
        let end = part.end.min(self.local_len(folding, rank));
        // The trailing dimensions that are stored whole, and the one before them, are contiguous in both.
        let whole = dims.iter().zip(&slice).rev().take_while(|(dim, range)| range.len() == **dim).count();
        let contiguous = dims.len().saturating_sub(whole + 1);
        let row: usize = slice[contiguous..].iter().map(ExactSizeIterator::len).product();
        let mut local = part.start;
        std::iter::from_fn(move || {
            if local >= end {
                return None;
            }
            let (mut outer, within) = (local / row, local % row);
            let (mut global, mut stride) = (within, 1);
            for (dim, range) in dims.iter().zip(&slice).skip(contiguous).rev() {
                global += range.start * stride;
                stride *= dim;
            }
            for (dim, range) in dims.iter().zip(&slice).take(contiguous).rev() {
                global += (range.start + outer % range.len()) * stride;
                outer /= range.len();
                stride *= dim;
            }
            let run = Run { local, global, len: (row - within).min(end - local) };
            local += run.len;
            Some(run)
        })
    }
}

/// A stretch of elements that is contiguous in a rank's shard and in the logical tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First element in the shard, flat and row-major.
    pub local: usize,
    /// First element in the logical tensor, flat and row-major.
    pub global: usize,
    /// Number of elements.
    pub len: usize,
}
