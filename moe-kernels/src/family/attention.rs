use crate::{Device, Float, Result, View, ViewMut};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttentionMask {
    /// All of the block.
    Full,
    /// Key `j` is seen by query `i` if `j ≤ first_query + i`, both counted from the start of their block.
    Causal,
    /// As [`Causal`](Self::Causal), but of those keys only the last `window` (at least 1):
    /// `first_query + i − window < j ≤ first_query + i`.
    SlidingWindow {
        /// Keys that a query sees, itself among them.
        window: usize,
    },
}

/// Sizes of one attention block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Queries per sequence; `q` has `q_len · batch` rows.
    pub q_len: usize,
    /// Keys per sequence; `k` and `v` have `kv_len · batch` rows.
    pub kv_len: usize,
    /// The key at whose position the first query stands: 0 where queries and keys are the same tokens, the number of keys
    /// before them where queries are the last of the tokens.
    pub first_query: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Size of a head of queries and keys.
    pub head_dim: usize,
    /// Size of a head of values and outputs; `head_dim` but for multi-head latent attention.
    pub v_head_dim: usize,
    /// Factor on the scores, `head_dim^−½` as a rule.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: AttentionMask,
}

/// Scaled dot-product attention with a streaming softmax (arXiv 2205.14135).
///
/// A call computes one block of keys. [`Attention::attention_merge`] joins the results of several blocks by their
/// log-sum-exp, and [`Attention::attention_backward`] takes the merged output and log-sum-exp, so that both work
/// block by block (ring attention).
///
/// `first_keys: [1, q_len · batch]`, a key for each row of `q`, hides keys before it from that query, besides what the mask hides: where
/// several documents are packed into one sequence, the first key of the query's own. Blocks of keys that no query of a block sees are not
/// computed, so that attention costs what the documents' lengths say.
///
/// Keys and values have to be finite, also where they are hidden: a hidden key weighs 0, and where its block is seen in part it is
/// multiplied all the same (0 · ∞ is no number). What lies, in whole blocks of 128 keys counted from the first, before or past all keys that
/// the queries of its sequence see may be anything; cuDNN does not promise that.
pub trait Attention<T: Float>: Device {
    /// `q: [q_len · batch, heads · head_dim]`, `k: [kv_len · batch, kv_heads · head_dim]`,
    /// `v: [kv_len · batch, kv_heads · v_head_dim]`, `o: [q_len · batch, heads · v_head_dim]`,
    /// `lse: [q_len · batch, heads]` (natural logarithm; −∞ where a query sees no key, whose output is 0).
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn attention(
        &self,
        o: ViewMut<'_, T, Self>,
        lse: ViewMut<'_, T::Acc, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()>;

    /// Joins a further block into `o` and `lse`: `o = o·exp(lse − l) + o_part·exp(lse_part − l)`, `lse = l`, with
    /// `l = log(exp(lse) + exp(lse_part))`. `o: [q, heads · v_head_dim]` is kept in the accumulation type.
    fn attention_merge(
        &self,
        o: ViewMut<'_, T::Acc, Self>,
        lse: ViewMut<'_, T::Acc, Self>,
        o_part: View<'_, T, Self>,
        lse_part: View<'_, T::Acc, Self>,
        v_head_dim: usize,
    ) -> Result<()>;

    /// Overwrites `dq`, `dk`, `dv` with this block's contribution; `o` and `lse` are those over all blocks.
    #[allow(clippy::too_many_arguments)] // the operands of the formula
    fn attention_backward(
        &self,
        dq: ViewMut<'_, T, Self>,
        dk: ViewMut<'_, T, Self>,
        dv: ViewMut<'_, T, Self>,
        d_o: View<'_, T, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        o: View<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()>;
}
