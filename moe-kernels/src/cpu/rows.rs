//! Moving rows.

use super::Cpu;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use crate::check;
use crate::family::Rows;
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
        let [n, cols] = y.shape();
        let x = Mat::from(x);
        check::shape(KERNEL, "x", [x.rows(), cols], [x.rows(), x.cols()])?;
        check::shape(KERNEL, "index", [1, n], index.shape())?;
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
}
