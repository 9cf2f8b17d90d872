//! Arithmetic on whole matrices.

use super::Cuda;
use super::fault::Fault;
use super::source::ELEMENTWISE;
use super::tiles::Tiles;
use super::vectors::vector;
use crate::family::{ColumnBlocks, Elementwise};
use crate::{Element, Float, Result, View, ViewMut, check};

/// Rows of a thread, but where many are summed: `ROWS` of the kernels.
const DOWN: usize = 4;

/// Rows of a sum that threads with several sums have room for.
const FEW: usize = 2;

impl Cuda {
    /// `y = x` in another type, by the kernel of that name for `T`.
    fn convert<T: Float, A: Element, B: Element>(
        &self,
        kernel: &'static str,
        mut y: ViewMut<'_, B, Self>,
        x: View<'_, A, Self>,
    ) -> Result<()> {
        check::shape(kernel, "x", y.shape(), x.shape())?;
        let each = vector::<A>().min(vector::<B>());
        let tiles = Tiles::new(x.shape(), each, DOWN).with(y.as_view()).with(x);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), kernel)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x);
        // SAFETY: shapes are equal, and the kernel touches the elements of that shape.
        unsafe { tiles.argument(launch).launch() }
    }
}

impl<T: Float> Elementwise<T> for Cuda {
    fn add(&self, mut y: ViewMut<'_, T, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()> {
        const KERNEL: &str = "add";
        check::shape(KERNEL, "a", y.shape(), a.shape())?;
        check::shape(KERNEL, "b", y.shape(), b.shape())?;
        let tiles = Tiles::new(y.shape(), vector::<T>(), DOWN).with(y.as_view()).with(a).with(b);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat(tiles.mat_mut(launch, &mut y), a), b);
        // SAFETY: shapes are equal, and the kernel touches the elements of that shape.
        unsafe { tiles.argument(launch).launch() }
    }

    fn add_assign(&self, mut y: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        const KERNEL: &str = "add_assign";
        check::shape(KERNEL, "x", y.shape(), x.shape())?;
        let tiles = Tiles::new(y.shape(), vector::<T>(), DOWN).with(y.as_view()).with(x);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x);
        // SAFETY: shapes are equal, and the kernel touches the elements of that shape.
        unsafe { tiles.argument(launch).launch() }
    }

    fn add_row(&self, mut y: ViewMut<'_, T, Self>, row: View<'_, T, Self>) -> Result<()> {
        let [_, cols] = y.shape();
        check::shape("add_row", "row", [1, cols], row.shape())?;
        let tiles = Tiles::new(y.shape(), vector::<T>(), DOWN).with(y.as_view()).with_other(row);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), "add_assign")?;
        // A matrix all rows of which are at one place.
        let launch = tiles.mat_mut(launch, &mut y).vector(row).size(0);
        // SAFETY: the kernel touches the elements of `y`, and as many of `row` as that has columns.
        unsafe { tiles.argument(launch).launch() }
    }

    fn widen(&self, y: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()> {
        self.convert::<T, _, _>("widen_rows", y, x)
    }

    fn narrow(&self, y: ViewMut<'_, T, Self>, x: View<'_, T::Acc, Self>) -> Result<()> {
        self.convert::<T, _, _>("narrow_rows", y, x)
    }

    fn widen_f64(&self, y: ViewMut<'_, f64, Self>, x: View<'_, T, Self>) -> Result<()> {
        self.convert::<T, _, _>("widen_f64", y, x)
    }

    fn narrow_f64(&self, y: ViewMut<'_, T, Self>, x: View<'_, f64, Self>) -> Result<()> {
        self.convert::<T, _, _>("narrow_f64", y, x)
    }

    fn gather_sum(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "gather_sum";
        let ([n, cols], [end, _], [_, sources]) = (y.shape(), x.shape(), index.shape());
        check::gather_sum(KERNEL, &y, x, index)?;
        check::argument(KERNEL, sources <= i32::MAX as usize, || format!("{sources} rows to a sum"))?;
        let (kernel, down) = if sources <= FEW { ("gather_sum_few", DOWN) } else { (KERNEL, 1) };
        let tiles = Tiles::new([n, cols], vector::<T>(), down).with(y.as_view()).with_other(x);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), kernel)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x).mat(index).value(sources as i32).size(end);
        // SAFETY: the kernel writes `n` rows of `cols` elements, and reads only rows of `x` below `end`.
        unsafe { tiles.argument(launch.fault(Fault::Index { what: "index", end })).launch() }
    }

    fn sum_column_blocks(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        x_at: ColumnBlocks,
        count: usize,
    ) -> Result<()> {
        const KERNEL: &str = "sum_column_blocks";
        let ([n, width], [_, x_cols]) = (y.shape(), x.shape());
        check::sum_column_blocks(KERNEL, &y, x, x_at, count)?;
        let x = if count == 0 { x } else { x.columns(x_at.first..x_cols)? };
        let tiles = Tiles::new([n, width], vector::<T>(), 1)
            .with(y.as_view())
            .with_other(x)
            .only_within(&[x_at.step]);
        let launch = self.kernel(&ELEMENTWISE.of(T::DTYPE), KERNEL)?;
        let launch = tiles.mat(tiles.mat_mut(launch, &mut y), x).size(x_at.step).size(count);
        // SAFETY: all blocks of columns lie inside `x`, which has as many rows as `y`.
        unsafe { tiles.argument(launch).launch() }
    }
}
