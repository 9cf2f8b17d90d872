use crate::{Device, Float, Result, View, ViewMut};

/// Cross-entropy over a vocabulary that is split in blocks, one per tensor-parallel rank.
///
/// Each rank computes the log-sum-exp and the target logit of its block; merging those (two numbers per token) gives
/// the loss `lse − target`. The gathered logits never exist.
pub trait Loss<T: Float>: Device {
    /// `lse, target: [1, n]` of this block: `logsumexp(logits[i])` (−∞ for an empty block) and the logit of
    /// `labels[i]` (0 if it lies in another block). `logits: [n, V_block]`, `labels: [1, n]`, `first` the id of
    /// the block's first column.
    fn cross_entropy(
        &self,
        lse: ViewMut<'_, T::Acc, Self>,
        target: ViewMut<'_, T::Acc, Self>,
        logits: View<'_, T, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()>;

    /// `lse[i] = log Σ_p exp(parts[p, i])`, p ascending. `parts: [P, n]`, `lse: [1, n]`.
    fn merge_lse(&self, lse: ViewMut<'_, T::Acc, Self>, parts: View<'_, T::Acc, Self>) -> Result<()>;

    /// The gradient of the logits in their place: `scale[i] · (exp(logits[i, c] − lse[i]) − [c = labels[i] − first])`;
    /// `lse: [1, n]` merged, `scale: [1, n]` the derivative of the objective by the token's loss.
    fn cross_entropy_backward(
        &self,
        logits: ViewMut<'_, T, Self>,
        lse: View<'_, T::Acc, Self>,
        labels: View<'_, i32, Self>,
        first: usize,
        scale: View<'_, T::Acc, Self>,
    ) -> Result<()>;

    /// [`cross_entropy`](Self::cross_entropy) and [`cross_entropy_backward`](Self::cross_entropy_backward) of a vocabulary
    /// that is one block: a device may read what both need once.
    fn cross_entropy_whole(
        &self,
        mut lse: ViewMut<'_, T::Acc, Self>,
        target: ViewMut<'_, T::Acc, Self>,
        logits: ViewMut<'_, T, Self>,
        labels: View<'_, i32, Self>,
        scale: View<'_, T::Acc, Self>,
    ) -> Result<()> {
        self.cross_entropy(lse.reborrow(), target, logits.as_view(), labels, 0)?;
        self.cross_entropy_backward(logits, lse.as_view(), labels, 0, scale)
    }
}
