//! What goes into a dispatch and what comes out of it.

/// The router's decision for the tokens of this rank. All vectors are flat, token by token.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing<I, W> {
    /// The chosen experts, `tokens · top_k` of them. Negative ones are routed nowhere.
    pub experts: I,
    /// The weight of each choice.
    pub weights: W,
    /// Tokens of this rank; may be 0.
    pub tokens: usize,
    /// Choices per token.
    pub top_k: usize,
    /// How many rows experts receive; the same on all ranks.
    pub shapes: Shapes,
}

/// How many rows are sent to experts: what choices ask for, or numbers that do not depend on the choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Shapes {
    /// As many as there are choices. Their numbers are exchanged.
    #[default]
    Exact,
    /// Exactly this many rows from each rank to each expert; rows without a choice are zeros with probability 0. No expert
    /// may be chosen more often by the tokens of one rank, and all ranks have equally many tokens; no numbers are
    /// exchanged. So only the rank whose expert is chosen too often returns that error, and the others that of their
    /// collective: drop first ([`capacity`](crate::capacity)).
    PerExpert(usize),
    /// At most this many rows per expert-parallel rank, a budget: experts get this number of rows, of which the last belong to
    /// none (fewer, if that is more than all choices). If any rank of a group would receive more, none of the group's
    /// choices is routed anywhere, and [`overflowed`](crate::DispatchState::overflowed) says so on all of them: the result
    /// is to be thrown away. A rank alone, which does not read its counts, compares all its choices, also those that are
    /// routed nowhere.
    PerRank(usize),
}

/// Rows for the experts of this rank, grouped by expert in ascending order.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch<X, W, I> {
    /// `[rows, hidden]`.
    pub x: X,
    /// The probability of each row, `[1, rows]`; multiplies the activation between the experts' two products.
    pub probs: W,
    /// First row of each local expert and the end of the last one, `[1, local experts + 1]`.
    pub offsets: I,
    /// Rows of `x`. Rows from the last offset on, if any, belong to no expert.
    pub rows: usize,
}

/// How many rows sorted choices take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SortedRows {
    /// Rows in total; choices are packed at the front, unused rows follow. At least as many as there are choices.
    Packed(usize),
    /// Rows of each expert, its choices first. More choices of an expert are an error.
    PerExpert(usize),
}

impl SortedRows {
    /// All of them; `usize::MAX`, for which no device has memory, if they are even more.
    pub const fn total(self, experts: usize) -> usize {
        match self {
            SortedRows::Packed(rows) => rows,
            SortedRows::PerExpert(rows) => rows.saturating_mul(experts),
        }
    }
}

/// Choices of tokens, sorted by expert; a stable sort, so a token's neighbours stay its neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct Sorted<I> {
    /// The choice that stands in each row, `token · top_k + k`, −1 in rows without; one entry per row.
    pub choice: I,
    /// The token that stands in each row, `choice / top_k`; −1 without a choice.
    pub token: I,
    /// The row of each choice, −1 for choices that have none; `tokens · top_k` entries.
    pub position: I,
    /// First row of each of the sorted experts and the end of the last one.
    pub offsets: I,
}
