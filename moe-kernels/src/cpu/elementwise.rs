//! Arithmetic on whole matrices.

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::{ColumnBlocks, Elementwise, Rows};
use crate::{Element, Result, View, ViewMut};

simd! {
    fn add<T>(y: MatMut<'_, T>, a: Mat<'_, T>, b: Mat<'_, T>) {
        for i in 0..y.rows() {
            for ((y, &a), &b) in y.row(i).iter_mut().zip(a.row(i)).zip(b.row(i)) {
                *y = a + b;
            }
        }
    }

    fn add_assign<T>(y: MatMut<'_, T>, x: Mat<'_, T>) {
        for i in 0..y.rows() {
            for (y, &x) in y.row(i).iter_mut().zip(x.row(i)) {
                *y += x;
            }
        }
    }

    fn add_row<T>(y: MatMut<'_, T>, row: &[T]) {
        for i in 0..y.rows() {
            for (y, &x) in y.row(i).iter_mut().zip(row) {
                *y += x;
            }
        }
    }

    fn gather_sum<T>(y: MatMut<'_, T>, x: Mat<'_, T>, index: Mat<'_, i32>) {
        for i in 0..y.rows() {
            let y = y.row(i);
            let mut sources = index.row(i).iter().filter(|&&s| s >= 0).map(|&s| x.row(s as usize));
            match (sources.next(), sources.next()) {
                (None, _) => y.fill(T::ZERO),
                (Some(a), None) => y.copy_from_slice(a),
                (Some(a), Some(b)) => {
                    for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                        *y = a + b;
                    }
                }
            }
            for x in sources {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y += x;
                }
            }
        }
    }

    fn sum_blocks<T>(y: MatMut<'_, T>, x: Mat<'_, T>, at: ColumnBlocks, count: usize) {
        for i in 0..y.rows() {
            let (y, x) = (y.row(i), x.row(i));
            y.fill(T::ZERO);
            for b in 0..count {
                for (y, &x) in y.iter_mut().zip(&x[at.first + b * at.step..]) {
                    *y += x;
                }
            }
        }
    }
}

/// `y = to(x)`.
fn convert<A: Element, B: Element>(
    device: &Cpu,
    mut y: MatMut<'_, B>,
    x: Mat<'_, A>,
    to: impl Fn(A) -> B + Sync,
) -> Result<()> {
    let tasks =
        blocks(x.rows(), rows_per_piece(x.cols())).map(|r| (y.take_rows(r.len()), x.row_range(r))).collect();
    device.for_each(tasks, |(mut y, x)| {
        for i in 0..y.rows() {
            y.row(i).iter_mut().zip(x.row(i)).for_each(|(y, &x)| *y = to(x));
        }
    })
}

impl<T: CpuFloat> Elementwise<T> for Cpu {
    fn add(&self, mut y: ViewMut<'_, T, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()> {
        check::shape("add", "a", y.shape(), a.shape())?;
        check::shape("add", "b", y.shape(), b.shape())?;
        let (a, b) = (Mat::from(a), Mat::from(b));
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(a.rows(), rows_per_piece(a.cols()))
            .map(|r| (y.take_rows(r.len()), a.row_range(r.clone()), b.row_range(r)))
            .collect();
        self.for_each(tasks, |(y, a, b)| add(y, a, b))
    }

    fn add_assign(&self, mut y: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        check::shape("add_assign", "x", y.shape(), x.shape())?;
        let x = Mat::from(x);
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(x.rows(), rows_per_piece(x.cols()))
            .map(|r| (y.take_rows(r.len()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(y, x)| add_assign(y, x))
    }

    fn add_row(&self, mut y: ViewMut<'_, T, Self>, row: View<'_, T, Self>) -> Result<()> {
        let [n, cols] = y.shape();
        check::shape("add_row", "row", [1, cols], row.shape())?;
        let row = Mat::from(row).vector();
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(cols)).map(|r| y.take_rows(r.len())).collect();
        self.for_each(tasks, |y| add_row(y, row))
    }

    fn widen(&self, y: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        self.copy_rows(y, x)
    }

    fn narrow(&self, y: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        self.copy_rows(y, x)
    }

    fn widen_f64(&self, mut y: ViewMut<'_, f64, Self>, x: View<'_, T, Self>) -> Result<()> {
        check::shape("widen_f64", "x", y.shape(), x.shape())?;
        convert(self, MatMut::from(&mut y), Mat::from(x), T::to_f64)
    }

    fn narrow_f64(&self, mut y: ViewMut<'_, T, Self>, x: View<'_, f64, Self>) -> Result<()> {
        check::shape("narrow_f64", "x", y.shape(), x.shape())?;
        convert(self, MatMut::from(&mut y), Mat::from(x), T::from_f64)
    }

    fn gather_sum(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        index: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "gather_sum";
        check::gather_sum(KERNEL, &y, x, index)?;
        let [n, cols] = y.shape();
        let (x, index) = (Mat::from(x), Mat::from(index));
        check::indices(KERNEL, "index", index.iter().flatten(), x.rows())?;
        let mut y = MatMut::from(&mut y);
        let tasks =
            blocks(n, rows_per_piece(cols)).map(|r| (y.take_rows(r.len()), index.row_range(r))).collect();
        self.for_each(tasks, |(y, index)| gather_sum(y, x, index))
    }

    fn sum_column_blocks(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        x_at: ColumnBlocks,
        count: usize,
    ) -> Result<()> {
        check::sum_column_blocks("sum_column_blocks", &y, x, x_at, count)?;
        let [n, width] = y.shape();
        let x = Mat::from(x);
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(count * width))
            .map(|r| (y.take_rows(r.len()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(y, x)| sum_blocks(y, x, x_at, count))
    }
}
