//! Moving rows.

use super::Cpu;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use crate::check;
use crate::family::{ColumnBlocks, Rows};
use crate::{Element, Result, View, ViewMut};

impl<E: Element> Rows<E> for Cpu {
    fn copy_rows(&self, mut y: ViewMut<'_, E, Self>, x: View<'_, E, Self>) -> Result<()> {
        check::shape("copy_rows", "x", y.shape(), x.shape())?;
        let x = Mat::from(x);
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(x.rows(), rows_per_piece(x.cols()))
            .map(|r| (y.take_rows(r.len()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(mut y, x)| {
            for (i, x) in x.iter().enumerate() {
                y.row(i).copy_from_slice(x);
            }
        })
    }

    fn gather_rows(
        &self,
        mut y: ViewMut<'_, E, Self>,
        x: View<'_, E, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "gather_rows";
        check::gather_rows(KERNEL, &y, x, index)?;
        let [n, cols] = y.shape();
        let x = Mat::from(x);
        let index = Mat::from(index).vector();
        check::indices(KERNEL, "index", index, x.rows())?;
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(cols)).map(|r| (y.take_rows(r.len()), &index[r])).collect();
        self.for_each(tasks, |(mut y, index): (MatMut<'_, E>, &[i32])| {
            for (i, &from) in index.iter().enumerate() {
                if from < 0 {
                    y.row(i).fill(E::zeroed());
                } else {
                    y.row(i).copy_from_slice(x.row(from as usize));
                }
            }
        })
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
        check::copy_column_blocks("copy_column_blocks", &y, y_at, x, x_at, count, width)?;
        let n = y.shape()[0];
        let x = Mat::from(x);
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(count * width))
            .map(|r| (y.take_rows(r.len()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(mut y, x): (MatMut<'_, E>, Mat<'_, E>)| {
            for (i, x) in x.iter().enumerate() {
                let y = y.row(i);
                for b in 0..count {
                    let (to, from) = (y_at.first + b * y_at.step, x_at.first + b * x_at.step);
                    y[to..to + width].copy_from_slice(&x[from..from + width]);
                }
            }
        })
    }
}
