use crate::{Device, Float, Result, View, ViewMut};

/// Lookup in one block of a vocabulary-parallel table.
pub trait Embedding<T: Float>: Device {
    /// `y[i] = table[ids[i] − first]`, zeros where that is outside this block. `y: [n, H]`, `table: [V_block, H]`,
    /// `ids: [1, n]`.
    fn embed(
        &self,
        y: ViewMut<'_, T, Self>,
        table: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()>;

    /// `dtable[ids[i] − first] += dy[i]` in ascending `i`, but for `ids[i] = padding_idx`. `dtable: [V_block, H]`.
    fn embed_backward(
        &self,
        dtable: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
        padding_idx: Option<usize>,
    ) -> Result<()>;
}
