//! Rows that are moved and summed.

use super::{argument, shape};
use crate::family::ColumnBlocks;
use crate::{Device, Element, Result, View, ViewMut};

/// An error unless `count` blocks of `width` columns lie within `cols`.
fn column_blocks(
    kernel: &'static str,
    what: &'static str,
    at: ColumnBlocks,
    count: usize,
    width: usize,
    cols: usize,
) -> Result<()> {
    let last = count.checked_sub(1).map(|last| at.first + last * at.step + width);
    argument(kernel, last.is_none_or(|end| end <= cols), || {
        format!("{count} blocks of {width} columns, {at:?}, exceed the {cols} columns of {what}")
    })
}

/// Operands of `copy_column_blocks`.
pub(crate) fn copy_column_blocks<E: Element, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, E, D>,
    y_at: ColumnBlocks,
    x: View<'_, E, D>,
    x_at: ColumnBlocks,
    count: usize,
    width: usize,
) -> Result<()> {
    let ([n, y_cols], [_, x_cols]) = (y.shape(), x.shape());
    shape(kernel, "x", [n, x_cols], x.shape())?;
    argument(kernel, count <= 1 || y_at.step >= width, || {
        format!("blocks of {width} columns overlap in y, {y_at:?}")
    })?;
    column_blocks(kernel, "y", y_at, count, width, y_cols)?;
    column_blocks(kernel, "x", x_at, count, width, x_cols)
}

/// Operands of `sum_column_blocks`.
pub(crate) fn sum_column_blocks<E: Element, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, E, D>,
    x: View<'_, E, D>,
    x_at: ColumnBlocks,
    count: usize,
) -> Result<()> {
    let ([n, width], [_, x_cols]) = (y.shape(), x.shape());
    shape(kernel, "x", [n, x_cols], x.shape())?;
    column_blocks(kernel, "x", x_at, count, width, x_cols)
}

/// Operands of `gather_rows`.
pub(crate) fn gather_rows<E: Element, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, E, D>,
    x: View<'_, E, D>,
    index: View<'_, i32, D>,
) -> Result<()> {
    let ([n, cols], [end, _]) = (y.shape(), x.shape());
    shape(kernel, "x", [end, cols], x.shape())?;
    shape(kernel, "index", [1, n], index.shape())
}

/// Operands of `spread_rows`.
pub(crate) fn spread_rows<E: Element, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, E, D>,
    x: View<'_, E, D>,
    index: View<'_, i32, D>,
    position: View<'_, i32, D>,
) -> Result<()> {
    gather_rows(kernel, y, x, index)?;
    shape(kernel, "position", [x.shape()[0], position.shape()[1]], position.shape())
}

/// Operands of `gather_sum`.
pub(crate) fn gather_sum<E: Element, D: Device>(
    kernel: &'static str,
    y: &ViewMut<'_, E, D>,
    x: View<'_, E, D>,
    index: View<'_, i32, D>,
) -> Result<()> {
    let ([n, cols], [end, _], [_, sources]) = (y.shape(), x.shape(), index.shape());
    shape(kernel, "x", [end, cols], x.shape())?;
    shape(kernel, "index", [n, sources], index.shape())
}
