//! Root-mean-square normalisation.

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Norm;
use crate::{Result, View, ViewMut};

simd! {
    fn forward<T>(y: MatMut<'_, T>, rstd: &mut [T], x: Mat<'_, T>, w: &[T], eps: T) {
        let n = T::from_f64(w.len() as f64);
        for (i, rstd) in rstd.iter_mut().enumerate() {
            let x = x.row(i);
            let r = T::ONE / (lanes::sum_by(x, |x| x * x) / n + eps).sqrt();
            for ((y, &x), &w) in y.row(i).iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
            *rstd = r;
        }
    }

    /// With `g = dy ⊙ w`: `dx = rstd · (g − x · rstd² · mean(g ⊙ x))`; `dw` is the sum over these rows.
    fn backward<T>(dx: MatMut<'_, T>, dw: &mut [T], dy: Mat<'_, T>, x: Mat<'_, T>, w: &[T], rstd: &[T]) {
        let n = T::from_f64(w.len() as f64);
        dw.fill(T::ZERO);
        for (i, &r) in rstd.iter().enumerate() {
            let (dx, dy, x) = (dx.row(i), dy.row(i), x.row(i));
            for ((((dx, dw), &dy), &x), &w) in dx.iter_mut().zip(dw.iter_mut()).zip(dy).zip(x).zip(w) {
                *dw += dy * x * r;
                *dx = dy * w;
            }
            let mean = lanes::sum_by2(dx, x, |g, x| g * x) / n;
            let c = r * r * mean;
            for (dx, &x) in dx.iter_mut().zip(x) {
                *dx = r * (*dx - x * c);
            }
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
        let [n, h] = x.shape();
        check::shape(KERNEL, "y", [n, h], y.shape())?;
        check::shape(KERNEL, "rstd", [1, n], rstd.shape())?;
        check::shape(KERNEL, "w", [1, h], w.shape())?;
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
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_backward";
        let [n, h] = x.shape();
        check::shape(KERNEL, "dx", [n, h], dx.shape())?;
        check::shape(KERNEL, "dw", [1, h], dw.shape())?;
        check::shape(KERNEL, "dy", [n, h], dy.shape())?;
        check::shape(KERNEL, "w", [1, h], w.shape())?;
        check::shape(KERNEL, "rstd", [1, n], rstd.shape())?;
        let (dy, x, w, rstd) = (Mat::from(dy), Mat::from(x), Mat::from(w).vector(), Mat::from(rstd).vector());
        let mut dx = MatMut::from(&mut dx);
        let pieces = blocks(n, rows_per_piece(h));
        let mut partial = vec![T::ZERO; pieces.clone().count() * h];
        let mut rest = partial.as_mut_slice();
        let tasks = pieces
            .map(|r| {
                let outputs = (dx.take_rows(r.len()), take(&mut rest, h));
                (outputs, dy.row_range(r.clone()), x.row_range(r.clone()), &rstd[r])
            })
            .collect();
        self.for_each(tasks, |((dx, dw), dy, x, rstd)| backward(dx, dw, dy, x, w, rstd))?;
        let count = partial.len().checked_div(h).unwrap_or(0);
        add_rows(MatMut::from(&mut dw).vector(), Mat::new(&partial, count, h));
        Ok(())
    }
}
