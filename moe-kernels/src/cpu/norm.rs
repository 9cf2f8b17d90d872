//! Root-mean-square normalisation.

use std::ops::Range;

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Norm;
use crate::{Result, View, ViewMut};

/// `y = x · r · w`.
#[inline(always)]
fn scale<T: CpuFloat>(y: &mut [T], x: &[T], w: &[T], r: T) {
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
        *y = x * r * w;
    }
}

/// `dx += past`.
#[inline(always)]
fn add_past<T: CpuFloat>(dx: &mut [T], past: &[T]) {
    for (dx, &past) in dx.iter_mut().zip(past) {
        *dx += past;
    }
}

/// With `g = dy ⊙ w` and `mean` that of `g ⊙ x`: `dx = r · (g − x · r² · mean)`, `dw += dy ⊙ x · r`.
#[inline(always)]
fn scale_back<T: CpuFloat>(dx: &mut [T], dw: &mut [T], dy: &[T], x: &[T], w: &[T], r: T, mean: T) {
    let c = r * r * mean;
    for ((((dx, dw), &dy), &x), &w) in dx.iter_mut().zip(dw).zip(dy).zip(x).zip(w) {
        *dw += dy * x * r;
        *dx = r * (dy * w - x * c);
    }
}

simd! {
    fn square_sums<T>(sums: &mut [T], x: Mat<'_, T>) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = lanes::sum_by(x.row(i), |x| x * x);
        }
    }

    fn forward<T>(y: MatMut<'_, T>, rstd: &mut [T], x: Mat<'_, T>, w: &[T], eps: T) {
        let n = T::from_f64(w.len() as f64);
        for (i, rstd) in rstd.iter_mut().enumerate() {
            let x = x.row(i);
            *rstd = T::ONE / (lanes::sum_by(x, |x| x * x) / n + eps).sqrt();
            scale(y.row(i), x, w, *rstd);
        }
    }

    fn forward_part<T>(
        y: MatMut<'_, T>,
        rstd: &mut [T],
        x: Mat<'_, T>,
        w: &[T],
        sums: &[T],
        width: T,
        eps: T,
    ) {
        for (i, (rstd, &sum)) in rstd.iter_mut().zip(sums).enumerate() {
            *rstd = T::ONE / (sum / width + eps).sqrt();
            scale(y.row(i), x.row(i), w, *rstd);
        }
    }

    fn gradient_sums<T>(sums: &mut [T], dy: Mat<'_, T>, x: Mat<'_, T>, w: &[T]) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = lanes::sum_by3(dy.row(i), w, x.row(i), |dy, w, x| dy * w * x);
        }
    }

    /// `dw` is the sum over these rows.
    fn backward<T>(
        dx: MatMut<'_, T>,
        dw: &mut [T],
        dy: Mat<'_, T>,
        x: Mat<'_, T>,
        w: &[T],
        rstd: &[T],
        past: Option<Mat<'_, T>>,
    ) {
        let n = T::from_f64(w.len() as f64);
        dw.fill(T::ZERO);
        for (i, &r) in rstd.iter().enumerate() {
            let (dx, dy, x) = (dx.row(i), dy.row(i), x.row(i));
            let mean = lanes::sum_by3(dy, w, x, |dy, w, x| dy * w * x) / n;
            scale_back(dx, dw, dy, x, w, r, mean);
            if let Some(past) = past {
                add_past(dx, past.row(i));
            }
        }
    }

    /// `dw` is the sum over these rows.
    fn backward_part<T>(
        dx: MatMut<'_, T>,
        dw: &mut [T],
        dy: Mat<'_, T>,
        x: Mat<'_, T>,
        w: &[T],
        rstd: &[T],
        sums: &[T],
        width: T,
    ) {
        dw.fill(T::ZERO);
        for (i, (&r, &sum)) in rstd.iter().zip(sums).enumerate() {
            scale_back(dx.row(i), dw, dy.row(i), x.row(i), w, r, sum / width);
        }
    }

    fn add_rows<T>(sum: &mut [T], rows: Mat<'_, T>) {
        for row in rows.iter() {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

impl<T: CpuFloat> Norm<T> for Cpu {
    fn rms_norm(
        &self,
        mut y: ViewMut<'_, T, Self>,
        mut rstd: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        eps: f64,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm";
        let [n, h] = check::rms_norm(KERNEL, &y, &rstd, x, w, None)?;
        let (x, w) = (Mat::from(x), Mat::from(w).vector());
        let (mut y, mut rstd) = (MatMut::from(&mut y), MatMut::from(&mut rstd).vector());
        let tasks = blocks(n, rows_per_piece(h))
            .map(|r| (y.take_rows(r.len()), take(&mut rstd, r.len()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(y, rstd, x)| forward(y, rstd, x, w, T::from_f64(eps)))
    }

    fn rms_norm_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        mut dw: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T, Self>,
        past: Option<View<'_, T, Self>>,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_backward";
        check::rms_norm_backward(KERNEL, &dx, &dw, dy, x, w, rstd, past, None)?;
        let (dy, x, w, rstd) = (Mat::from(dy), Mat::from(x), Mat::from(w).vector(), Mat::from(rstd).vector());
        let past = past.map(Mat::from);
        self.backward_by_pieces(MatMut::from(&mut dx), MatMut::from(&mut dw), |dx, dw, rows| {
            let (dy, x) = (dy.row_range(rows.clone()), x.row_range(rows.clone()));
            let past = past.map(|past| past.row_range(rows.clone()));
            backward(dx, dw, dy, x, w, &rstd[rows], past);
        })
    }

    fn rms_norm_sums(&self, mut sums: ViewMut<'_, T, Self>, x: View<'_, T, Self>) -> Result<()> {
        let [n, h] = x.shape();
        check::shape("rms_norm_sums", "sums", [1, n], sums.shape())?;
        let (x, mut sums) = (Mat::from(x), MatMut::from(&mut sums).vector());
        let tasks =
            blocks(n, rows_per_piece(h)).map(|r| (take(&mut sums, r.len()), x.row_range(r))).collect();
        self.for_each(tasks, |(sums, x)| square_sums(sums, x))
    }

    fn rms_norm_part(
        &self,
        mut y: ViewMut<'_, T, Self>,
        mut rstd: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        sums: View<'_, T, Self>,
        width: usize,
        eps: f64,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_part";
        let [n, h] = check::rms_norm(KERNEL, &y, &rstd, x, w, Some(sums))?;
        let (x, w, sums) = (Mat::from(x), Mat::from(w).vector(), Mat::from(sums).vector());
        let (mut y, mut rstd) = (MatMut::from(&mut y), MatMut::from(&mut rstd).vector());
        let (width, eps) = (T::from_f64(width as f64), T::from_f64(eps));
        let tasks = blocks(n, rows_per_piece(h))
            .map(|r| (y.take_rows(r.len()), take(&mut rstd, r.len()), x.row_range(r.clone()), &sums[r]))
            .collect();
        self.for_each(tasks, |(y, rstd, x, sums)| forward_part(y, rstd, x, w, sums, width, eps))
    }

    fn rms_norm_backward_sums(
        &self,
        mut sums: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_backward_sums";
        let [n, h] = check::rms_norm_backward_sums(KERNEL, &sums, dy, x, w)?;
        let (dy, x, w) = (Mat::from(dy), Mat::from(x), Mat::from(w).vector());
        let mut sums = MatMut::from(&mut sums).vector();
        let tasks = blocks(n, rows_per_piece(h))
            .map(|r| (take(&mut sums, r.len()), dy.row_range(r.clone()), x.row_range(r)))
            .collect();
        self.for_each(tasks, |(sums, dy, x)| gradient_sums(sums, dy, x, w))
    }

    fn rms_norm_part_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        mut dw: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T, Self>,
        sums: View<'_, T, Self>,
        width: usize,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_part_backward";
        check::rms_norm_backward(KERNEL, &dx, &dw, dy, x, w, rstd, None, Some(sums))?;
        let (dy, x, w) = (Mat::from(dy), Mat::from(x), Mat::from(w).vector());
        let (rstd, sums) = (Mat::from(rstd).vector(), Mat::from(sums).vector());
        let width = T::from_f64(width as f64);
        self.backward_by_pieces(MatMut::from(&mut dx), MatMut::from(&mut dw), |dx, dw, rows| {
            let (dy, x) = (dy.row_range(rows.clone()), x.row_range(rows.clone()));
            backward_part(dx, dw, dy, x, w, &rstd[rows.clone()], &sums[rows], width);
        })
    }
}

impl Cpu {
    /// Calls `backward` for each piece of the rows with its part of `dx` and a `dw` of its own; these are added in order.
    fn backward_by_pieces<T: CpuFloat>(
        &self,
        mut dx: MatMut<'_, T>,
        dw: MatMut<'_, T>,
        backward: impl Fn(MatMut<'_, T>, &mut [T], Range<usize>) + Sync,
    ) -> Result<()> {
        let (n, h) = (dx.rows(), dx.cols());
        let pieces = blocks(n, rows_per_piece(h));
        let mut partial = vec![T::ZERO; pieces.clone().count() * h];
        let mut rest = partial.as_mut_slice();
        let tasks = pieces.map(|rows| (dx.take_rows(rows.len()), take(&mut rest, h), rows)).collect();
        self.for_each(tasks, |(dx, dw, rows)| backward(dx, dw, rows))?;
        let count = partial.len().checked_div(h).unwrap_or(0);
        add_rows(dw.vector(), Mat::new(&partial, count, h));
        Ok(())
    }
}
