//! What a tensor library lends.

use std::ops::Range;

use crate::{Error, Grid, Sorted, SortedRows};

/// The ranks a transfer goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Over {
    /// Expert-tensor parallelism: ranks that hold slices of the same experts.
    Etp,
    /// All ranks that share a set of experts, in the order of [`Grid::position`].
    EpEtp,
}

/// A movement of rows between ranks. Counts are rows, one per rank in the order of the group, and may be 0. A tensor
/// may have more rows than are sent: what follows them (choices routed nowhere) stays at home.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer<'a> {
    /// Over EP: the first `send[0]` rows go to rank 0, the next `send[1]` to rank 1, …; what arrives stands in rank
    /// order, `recv[i]` rows from rank `i`.
    AllToAll {
        /// Rows to each rank.
        send: &'a [usize],
        /// Rows from each rank.
        recv: &'a [usize],
    },
    /// Every rank receives the rows of all in rank order; rank `i` gives `rows[i]`.
    AllGather {
        /// Between whom.
        over: Over,
        /// Rows of each rank.
        rows: &'a [usize],
    },
    /// The sum over the ranks, row by row, of which rank `i` receives the `i`-th block of `rows[i]` rows. Summed in
    /// ascending rank, in the accumulation type, rounded once.
    ReduceScatter {
        /// Between whom.
        over: Over,
        /// Rows of each block.
        rows: &'a [usize],
    },
}

/// Rows that arrived, with the numbers that travelled beside them.
pub type Arrived<F> = (<F as Fabric>::Tensor, Option<<F as Fabric>::Weights>);

/// A tensor library with its communicators, as far as a dispatcher needs it.
///
/// Tensors are matrices `[rows, hidden]`; weights and indices are flat vectors. Operations must take empty ones: a
/// rank without tokens joins every collective. All ranks of a group make the same transfers in the same order, and may
/// await them in another one. Nothing is exchanged, gathered or started over a group of one rank.
///
/// `NativeFabric` (feature `native`) implements it on this workspace's tensors; `examples/plain_vec.rs` on
/// `Vec<f32>` and channels.
pub trait Fabric {
    /// Activations and their gradients, `[rows, hidden]`.
    type Tensor;
    /// Probabilities and their gradients, in the accumulation type.
    type Weights;
    /// `i32` indices. A handle: clones should share memory.
    type Index: Clone;
    /// A transfer under way.
    type Pending;
    /// The library's error.
    type Error: From<Error>;

    /// This rank's coordinates.
    fn grid(&self) -> Grid;

    /// An index with these entries.
    fn index(&self, entries: &[i32]) -> Result<Self::Index, Self::Error>;

    /// How many entries an index has.
    fn index_len(&self, index: &Self::Index) -> usize;

    /// Sorts the choices whose expert lies in `local` by expert; stable. `experts` has `top_k` entries per token in
    /// `0..num_experts`, or negative; those outside `local` get position −1.
    fn sort_by_expert(
        &self,
        experts: &Self::Index,
        top_k: usize,
        num_experts: usize,
        local: Range<usize>,
        rows: SortedRows,
    ) -> Result<Sorted<Self::Index>, Self::Error>;

    /// `y[i] = x[index[i]]`; a row of zeros where the index is negative.
    fn gather_rows(&self, x: &Self::Tensor, index: &Self::Index) -> Result<Self::Tensor, Self::Error>;

    /// The rows of `x` by expert: `y[i] = x[sorted.token[i]]`; a row of zeros where that is negative.
    fn to_sorted(&self, x: &Self::Tensor, sorted: &Sorted<Self::Index>) -> Result<Self::Tensor, Self::Error> {
        self.gather_rows(x, &sorted.token)
    }

    /// `y[i] = Σ_k x[index[i · top_k + k]]` in ascending `k`, summed in the accumulation type and rounded once.
    /// Negative entries are skipped.
    fn gather_sum(
        &self,
        x: &Self::Tensor,
        index: &Self::Index,
        top_k: usize,
    ) -> Result<Self::Tensor, Self::Error>;

    /// `y[i] = w[index[i]]`; zero where the index is negative.
    fn gather_weights(&self, w: &Self::Weights, index: &Self::Index) -> Result<Self::Weights, Self::Error>;

    /// Exchanges counts over EP×ETP and brings them to the host: the entries of every rank's `offsets`, followed by
    /// its `tokens`, in the order of [`Grid::position`]. `offsets` has the same length on all ranks.
    ///
    /// Called once per layer and micro-batch.
    fn exchange_counts(&self, offsets: &Self::Index, tokens: usize) -> Result<Vec<i32>, Self::Error>;

    /// The entries of every rank's index over EP×ETP, in the order of [`Grid::position`]; rank `i` gives
    /// `counts[i]`.
    fn all_gather_index(&self, index: &Self::Index, counts: &[usize]) -> Result<Self::Index, Self::Error>;

    /// Starts a transfer of rows and, if given, of `per_row` weights beside each row.
    ///
    /// What is sent stays as it is until the transfer ends; a fabric keeps hold of it, or copies.
    fn start(
        &self,
        x: &Self::Tensor,
        weights: Option<&Self::Weights>,
        per_row: usize,
        transfer: Transfer<'_>,
    ) -> Result<Self::Pending, Self::Error>;

    /// Waits for a transfer; weights arrive if weights were sent.
    fn wait(&self, pending: Self::Pending) -> Result<Arrived<Self>, Self::Error>
    where
        Self: Sized;
}
