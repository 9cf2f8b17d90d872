//! Gated activations.

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Activation;
use crate::{Result, View, ViewMut};

simd! {
    fn forward<T>(y: MatMut<'_, T>, gate_up: Mat<'_, T>, p: Option<&[T]>) {
        let width = y.cols();
        for i in 0..y.rows() {
            let p = p.map_or(T::ONE, |p| p[i]);
            let (gate, up) = gate_up.row(i).split_at(width);
            for ((y, &g), &u) in y.row(i).iter_mut().zip(gate).zip(up) {
                *y = g * g.sigmoid() * u * p;
            }
        }
    }

    /// With `s = σ(g)`: `dup = dy·p·g·s`, `dgate = dy·p·u·s·(1 + g·(1 − s))`, `dp = Σ dy·g·s·u`, which is
    /// `Σ dup·u` before the factor `p`.
    fn backward<T>(dgate_up: MatMut<'_, T>, dp: Option<&mut [T]>, dy: Mat<'_, T>, gate_up: Mat<'_, T>, p: Option<&[T]>) {
        let width = dy.cols();
        for i in 0..dy.rows() {
            let (gate, up) = gate_up.row(i).split_at(width);
            let (dgate, dup) = dgate_up.row(i).split_at_mut(width);
            for ((((dg, du), &dy), &g), &u) in dgate.iter_mut().zip(dup.iter_mut()).zip(dy.row(i)).zip(gate).zip(up) {
                let s = g.sigmoid();
                *du = dy * g * s;
                *dg = dy * u * s * (T::ONE + g * (T::ONE - s));
            }
            if let Some(dp) = &mut dp {
                dp[i] = lanes::sum_by2(dup, up, |du, u| du * u);
            }
            if let Some(p) = p {
                for d in dgate_up.row(i) {
                    *d *= p[i];
                }
            }
        }
    }
}

impl<T: CpuFloat> Activation<T> for Cpu {
    fn swiglu(
        &self,
        mut y: ViewMut<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T, Self>>,
    ) -> Result<()> {
        const KERNEL: &str = "swiglu";
        let [n, width] = y.shape();
        check::shape(KERNEL, "gate_up", [n, 2 * width], gate_up.shape())?;
        if let Some(p) = p {
            check::shape(KERNEL, "p", [1, n], p.shape())?;
        }
        let (gate_up, p) = (Mat::from(gate_up), p.map(|p| Mat::from(p).vector()));
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| (y.take_rows(r.len()), gate_up.row_range(r.clone()), p.map(|p| &p[r])))
            .collect();
        self.for_each(tasks, |(y, gate_up, p)| forward(y, gate_up, p))
    }

    fn swiglu_backward(
        &self,
        mut dgate_up: ViewMut<'_, T, Self>,
        mut dp: Option<ViewMut<'_, T, Self>>,
        dy: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T, Self>>,
    ) -> Result<()> {
        const KERNEL: &str = "swiglu_backward";
        let [n, width] = dy.shape();
        check::shape(KERNEL, "gate_up", [n, 2 * width], gate_up.shape())?;
        check::shape(KERNEL, "dgate_up", [n, 2 * width], dgate_up.shape())?;
        if let Some(p) = p {
            check::shape(KERNEL, "p", [1, n], p.shape())?;
        }
        if let Some(dp) = &dp {
            check::shape(KERNEL, "dp", [1, n], dp.shape())?;
        }
        let (dy, gate_up, p) = (Mat::from(dy), Mat::from(gate_up), p.map(|p| Mat::from(p).vector()));
        let mut dgate_up = MatMut::from(&mut dgate_up);
        let mut dp = dp.as_mut().map(|dp| MatMut::from(dp).vector());
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| {
                let outputs = (dgate_up.take_rows(r.len()), dp.as_mut().map(|dp| take(dp, r.len())));
                (outputs, dy.row_range(r.clone()), gate_up.row_range(r.clone()), p.map(|p| &p[r]))
            })
            .collect();
        self.for_each(tasks, |((dgate_up, dp), dy, gate_up, p)| backward(dgate_up, dp, dy, gate_up, p))
    }
}
