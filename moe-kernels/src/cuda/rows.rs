//! Moving rows.

use super::Cuda;
use super::fault::Fault;
use super::source::ROWS;
use super::tiles::Tiles;
use super::vectors::vector;
use crate::family::{ColumnBlocks, Rows};
use crate::{Element, Result, View, ViewMut, check};

/// Rows of a thread: `ROWS` of the kernels.
const DOWN: usize = 4;

/// Threads of a block that looks for rows without an index.
const THREADS: usize = 256;

impl<E: Element> Rows<E> for Cuda {
    fn copy_rows(&self, mut y: ViewMut<'_, E, Self>, x: View<'_, E, Self>) -> Result<()> {
        const KERNEL: &str = "copy_rows";
        check::shape(KERNEL, "x", y.shape(), x.shape())?;
        let tiles = Tiles::new(x.shape(), vector::<E>(), DOWN).with(y.as_view()).with(x);
        let launch = self.kernel(&ROWS.of(E::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x);
        // SAFETY: shapes are equal, and the kernel touches the elements of that shape.
        unsafe { tiles.argument(launch).launch() }
    }

    fn gather_rows(
        &self,
        mut y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "gather_rows";
        let ([n, cols], [end, _]) = (y.shape(), x.shape());
        check::gather_rows(KERNEL, &y, x, index)?;
        let tiles = Tiles::new([n, cols], vector::<E>(), DOWN).with(y.as_view()).with_other(x);
        let launch = self.kernel(&ROWS.of(E::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x).vector(index).size(end);
        // SAFETY: the kernel writes `n` rows of `cols` elements, and reads only rows of `x` below `end`.
        unsafe { tiles.argument(launch.fault(Fault::Index { what: "index", end })).launch() }
    }

    fn spread_rows(
        &self,
        mut y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
        position: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "spread_rows";
        let [n, cols] = y.shape();
        check::spread_rows(KERNEL, &y, x, index, position)?;
        let launch = self.kernel(&ROWS.of(E::DTYPE), "zero_rows")?.grid([n.div_ceil(THREADS), 1, 1]);
        let launch = launch.block([THREADS, 1, 1]).mat_mut(&mut y).vector(index).size(n).size(cols);
        // SAFETY: the kernel writes rows of `y` alone, which are `n` of `cols` elements.
        unsafe { launch.launch()? };
        let tiles =
            Tiles::new([x.shape()[0], cols], vector::<E>(), DOWN).with_other(y.as_view()).with_other(x);
        let launch = self.kernel(&ROWS.of(E::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x).mat(position).size(position.shape()[1]);
        let outside = Fault::Index { what: "position", end: n };
        // SAFETY: the kernel writes only rows of `y` below `n`, and reads as many rows of `x` as there are positions for.
        unsafe { tiles.argument(launch.size(n).fault(outside)).launch() }
    }

    fn copy_column_blocks(
        &self,
        y: ViewMut<'_, E, Self>,
        y_at: ColumnBlocks,
        x: View<'_, E, Self>,
        x_at: ColumnBlocks,
        count: usize,
        width: usize,
    ) -> Result<()> {
        const KERNEL: &str = "copy_column_blocks";
        check::copy_column_blocks(KERNEL, &y, y_at, x, x_at, count, width)?;
        let ([n, y_cols], [_, x_cols]) = (y.shape(), x.shape());
        if count == 0 {
            return Ok(());
        }
        let (mut y, x) = (y.columns(y_at.first..y_cols)?, x.columns(x_at.first..x_cols)?);
        let tiles = Tiles::new([n, count * width], vector::<E>(), DOWN)
            .with_other(y.as_view())
            .with_other(x)
            .only_within(&[width, y_at.step, x_at.step]);
        let launch = self.kernel(&ROWS.of(E::DTYPE), KERNEL)?;
        let launch = tiles.mat_mut(launch, &mut y).size(y_at.step);
        let launch = tiles.mat(launch, x).size(x_at.step).size(width);
        // SAFETY: all blocks of columns lie inside both matrices, which have `n` rows.
        unsafe { tiles.argument(launch).launch() }
    }
}
