//! Sums.

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Reduce;
use crate::{Result, View, ViewMut};

/// Columns of one piece of a dot product of long rows.
const COLS: usize = 16 * 1024;

simd! {
    fn dot<T>(a: Mat<'_, T>, b: Mat<'_, T>) -> f64 {
        let mut sum = 0.0;
        for (a, b) in a.iter().zip(b.iter()) {
            sum += lanes::sum_by2(a, b, |a, b| a.to_f64() * b.to_f64());
        }
        sum
    }

    fn column_sums<T>(out: &mut [T], x: Mat<'_, T>) {
        out.fill(T::ZERO);
        for row in x.iter() {
            for (out, &x) in out.iter_mut().zip(row) {
                *out += x;
            }
        }
    }
}

impl<T: CpuFloat> Reduce<T> for Cpu {
    fn dot(&self, mut out: ViewMut<'_, f64, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()> {
        const KERNEL: &str = "dot";
        check::shape(KERNEL, "b", a.shape(), b.shape())?;
        check::shape(KERNEL, "out", [1, 1], out.shape())?;
        let (a, b) = (Mat::from(a), Mat::from(b));
        let pieces: Vec<_> = blocks(a.rows(), rows_per_piece(a.cols()))
            .flat_map(|rows| blocks(a.cols(), COLS).map(move |cols| (rows.clone(), cols)))
            .collect();
        let mut partial = vec![0.0; pieces.len()];
        self.for_each(pieces.into_iter().zip(&mut partial).collect(), |((rows, cols), sum)| {
            let (a, b) = (a.row_range(rows.clone()), b.row_range(rows));
            *sum = dot(a.col_range(cols.clone()), b.col_range(cols));
        })?;
        MatMut::from(&mut out).vector()[0] += partial.iter().sum::<f64>();
        Ok(())
    }

    fn column_sums(&self, mut out: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        let [_, cols] = x.shape();
        check::shape("column_sums", "out", [1, cols], out.shape())?;
        let x = Mat::from(x);
        let mut out = MatMut::from(&mut out).vector();
        // Pieces of columns: every sum runs over ascending rows.
        let tasks = blocks(cols, rows_per_piece(x.rows()).max(64))
            .map(|c| (take(&mut out, c.len()), x.col_range(c)))
            .collect();
        self.for_each(tasks, |(out, x)| column_sums(out, x))
    }
}
