use crate::{Device, Element, Result, View, ViewMut, check};

/// Blocks of columns of one width, evenly spaced: block `b` starts at column `first + b · step`. With a step of 0 they are
/// one and the same, to be read only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColumnBlocks {
    /// Where block 0 starts.
    pub first: usize,
    /// From the start of one to that of the next.
    pub step: usize,
}

/// Moving rows.
pub trait Rows<E: Element>: Device {
    /// `y = x`, shapes equal, strides free.
    fn copy_rows(&self, y: ViewMut<'_, E, Self>, x: View<'_, E, Self>) -> Result<()>;

    /// `y[i] = x[index[i]]`. `index: [1, n]`; a negative index gives a row of zeros, one past the end an error.
    fn gather_rows(
        &self,
        y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()>;

    /// What [`gather_rows`](Rows::gather_rows) gives by `index`, for `index` of which it is known where each row of `x` stands in it:
    /// `index[position[i, j]] = i` for the positions that are not negative, and all other entries are negative. `position: [m, k]` for
    /// `x: [m, …]`. Read by `position`, each row of `x` is read once.
    fn spread_rows(
        &self,
        y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
        position: View<'_, i32, Self>,
    ) -> Result<()> {
        check::spread_rows("spread_rows", &y, x, index, position)?;
        self.gather_rows(y, x, index)
    }

    /// `y[i, y_at(b) + j] = x[i, x_at(b) + j]` for each of `count` blocks `b` of `width` columns `j`; the other columns of
    /// `y` stay as they are. Blocks of `y` must not overlap. What stands in each head goes beside what is common to all
    /// heads this way.
    fn copy_column_blocks(
        &self,
        y: ViewMut<'_, E, Self>,
        y_at: ColumnBlocks,
        x: View<'_, E, Self>,
        x_at: ColumnBlocks,
        count: usize,
        width: usize,
    ) -> Result<()>;
}
