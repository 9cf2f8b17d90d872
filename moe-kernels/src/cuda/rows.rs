//! Moving rows.

use super::Cuda;
use super::fault::Fault;
use super::launch::blocks;
use super::source::ROWS;
use crate::family::{ColumnBlocks, Rows};
use crate::{Element, Result, View, ViewMut, check};

/// Elements of a row that one warp moves, and warps of a block: `PIECE` of the kernels, and their blocks.
const PIECE: usize = 1024;
const WARPS: usize = 8;

/// Blocks for so many rows.
fn grid(rows: usize, cols: usize) -> [usize; 3] {
    blocks(rows * cols.div_ceil(PIECE), WARPS)
}

impl<E: Element> Rows<E> for Cuda {
    fn copy_rows(&self, mut y: ViewMut<'_, E, Self>, x: View<'_, E, Self>) -> Result<()> {
        check::shape("copy_rows", "x", y.shape(), x.shape())?;
        let [n, cols] = y.shape();
        let launch = self.kernel(&ROWS.of(E::DTYPE), "copy_rows")?.grid(grid(n, cols)).block([32, WARPS, 1]);
        // SAFETY: shapes are equal, and the kernel touches `n` rows of `cols` elements.
        unsafe { launch.mat_mut(&mut y).mat(x).size(n).size(cols).launch() }
    }

    fn gather_rows(
        &self,
        mut y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "gather_rows";
        let ([n, cols], [end, _]) = (y.shape(), x.shape());
        check::shape(KERNEL, "x", [end, cols], x.shape())?;
        check::shape(KERNEL, "index", [1, n], index.shape())?;
        let launch =
            self.kernel(&ROWS.of(E::DTYPE), KERNEL)?.grid(grid(n, cols.max(1))).block([32, WARPS, 1]);
        let launch = launch.mat_mut(&mut y).mat(x).vector(index).size(n).size(cols).size(end);
        // SAFETY: the kernel writes `n` rows of `cols` elements, and reads only rows of `x` below `end`.
        unsafe { launch.fault(Fault::Index { what: "index", end }).launch() }
    }

    fn copy_column_blocks(
        &self,
        mut y: ViewMut<'_, E, Self>,
        y_at: ColumnBlocks,
        x: View<'_, E, Self>,
        x_at: ColumnBlocks,
        count: usize,
        width: usize,
    ) -> Result<()> {
        const KERNEL: &str = "copy_column_blocks";
        let ([n, y_cols], [_, x_cols]) = (y.shape(), x.shape());
        check::shape(KERNEL, "x", [n, x_cols], x.shape())?;
        check::argument(KERNEL, count <= 1 || y_at.step >= width, || {
            format!("blocks of {width} columns overlap in y, {y_at:?}")
        })?;
        check::column_blocks(KERNEL, "y", y_at, count, width, y_cols)?;
        check::column_blocks(KERNEL, "x", x_at, count, width, x_cols)?;
        let launch =
            self.kernel(&ROWS.of(E::DTYPE), KERNEL)?.grid(grid(n * count, width)).block([32, WARPS, 1]);
        let launch = launch.mat_mut(&mut y).size(y_at.first).size(y_at.step);
        let launch = launch.mat(x).size(x_at.first).size(x_at.step);
        // SAFETY: all blocks of columns lie inside both matrices, which have `n` rows.
        unsafe { launch.size(n).size(count).size(width).launch() }
    }
}
