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

/// Choices of tokens, sorted by expert; a stable sort, so a token's neighbours stay its neighbours.
#[derive(Debug, Clone, PartialEq)]
pub struct Sorted<I> {
    /// The choice that stands in each row, `token · top_k + k`; one entry per row.
    pub choice: I,
    /// The token that stands in each row, `choice / top_k`.
    pub token: I,
    /// The row of each choice, −1 for choices that have none; `tokens · top_k` entries.
    pub position: I,
    /// First row of each of the sorted experts and the end of the last one.
    pub offsets: I,
}
