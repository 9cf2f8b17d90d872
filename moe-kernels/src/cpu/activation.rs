//! Gated activations.

use super::Cpu;
use super::float::CpuFloat;
use super::lanes;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::{Activation, GateFunction};
use crate::{Result, View, ViewMut};

/// Both functions are `g · σ(v)`: SiLU with `v = g`, GELU's tanh approximation with `v = 2·√(2/π)·(g + 0.044715·g³)`.
const GELU: f64 = 2.0 * 0.797_884_560_802_865_4; // 2·√(2/π)
const GELU_CUBIC: f64 = 0.044_715;

/// `v` of the tanh approximation of GELU.
#[inline(always)]
fn gelu_argument<T: CpuFloat>(g: T) -> T {
    T::from_f64(GELU) * g * (T::ONE + T::from_f64(GELU_CUBIC) * g * g)
}

/// `dv/dg` of the tanh approximation of GELU.
#[inline(always)]
fn gelu_slope<T: CpuFloat>(g: T) -> T {
    T::from_f64(GELU) * (T::ONE + T::from_f64(3.0 * GELU_CUBIC) * g * g)
}

#[inline(always)]
fn forward_with<T: CpuFloat>(
    mut y: MatMut<'_, T>,
    gate_up: Mat<'_, T>,
    p: Option<&[T]>,
    argument: impl Fn(T) -> T,
) {
    let width = y.cols();
    for i in 0..y.rows() {
        let p = p.map_or(T::ONE, |p| p[i]);
        let (gate, up) = gate_up.row(i).split_at(width);
        for ((y, &g), &u) in y.row(i).iter_mut().zip(gate).zip(up) {
            *y = g * argument(g).sigmoid() * u * p;
        }
    }
}

/// With `s = σ(v(g))`: `dup = dy·p·g·s`, `dgate = dy·p·u·s·(1 + g·(1 − s)·v′(g))`, `dp = Σ dy·g·s·u`, which is
/// `Σ dup·u` before the factor `p`.
#[inline(always)]
fn backward_with<T: CpuFloat>(
    mut dgate_up: MatMut<'_, T>,
    mut dp: Option<&mut [T]>,
    dy: Mat<'_, T>,
    gate_up: Mat<'_, T>,
    p: Option<&[T]>,
    argument: impl Fn(T) -> T,
    slope: impl Fn(T) -> T,
) {
    let width = dy.cols();
    for i in 0..dy.rows() {
        let (gate, up) = gate_up.row(i).split_at(width);
        let (dgate, dup) = dgate_up.row(i).split_at_mut(width);
        for ((((dg, du), &dy), &g), &u) in
            dgate.iter_mut().zip(dup.iter_mut()).zip(dy.row(i)).zip(gate).zip(up)
        {
            let s = argument(g).sigmoid();
            *du = dy * g * s;
            *dg = dy * u * s * (T::ONE + g * (T::ONE - s) * slope(g));
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

simd! {
    fn forward<T>(y: MatMut<'_, T>, gate_up: Mat<'_, T>, p: Option<&[T]>, function: GateFunction) {
        match function {
            GateFunction::Silu => forward_with(y, gate_up, p, |g| g),
            GateFunction::GeluTanh => forward_with(y, gate_up, p, gelu_argument),
        }
    }

    fn backward<T>(
        dgate_up: MatMut<'_, T>,
        dp: Option<&mut [T]>,
        dy: Mat<'_, T>,
        gate_up: Mat<'_, T>,
        p: Option<&[T]>,
        function: GateFunction,
    ) {
        match function {
            GateFunction::Silu => backward_with(dgate_up, dp, dy, gate_up, p, |g| g, |_| T::ONE),
            GateFunction::GeluTanh => backward_with(dgate_up, dp, dy, gate_up, p, gelu_argument, gelu_slope),
        }
    }

    fn gate_rows<T>(y: MatMut<'_, T>, x: Mat<'_, T>, gate: Mat<'_, T>) {
        for i in 0..y.rows() {
            let s = gate.row(i)[0].sigmoid();
            for (y, &x) in y.row(i).iter_mut().zip(x.row(i)) {
                *y = x * s;
            }
        }
    }

    fn gate_rows_backward<T>(
        dx: MatMut<'_, T>,
        dgate: MatMut<'_, T>,
        dy: Mat<'_, T>,
        x: Mat<'_, T>,
        gate: Mat<'_, T>,
    ) {
        for i in 0..dx.rows() {
            let s = gate.row(i)[0].sigmoid();
            dgate.row(i)[0] = lanes::sum_by2(dy.row(i), x.row(i), |dy, x| dy * x) * s * (T::ONE - s);
            for (dx, &dy) in dx.row(i).iter_mut().zip(dy.row(i)) {
                *dx = dy * s;
            }
        }
    }
}

impl<T: CpuFloat> Activation<T> for Cpu {
    fn glu(
        &self,
        mut y: ViewMut<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T, Self>>,
        function: GateFunction,
    ) -> Result<()> {
        const KERNEL: &str = "glu";
        let [n, width] = check::glu(KERNEL, y.shape(), gate_up, p)?;
        let (gate_up, p) = (Mat::from(gate_up), p.map(|p| Mat::from(p).vector()));
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| (y.take_rows(r.len()), gate_up.row_range(r.clone()), p.map(|p| &p[r])))
            .collect();
        self.for_each(tasks, |(y, gate_up, p)| forward(y, gate_up, p, function))
    }

    fn glu_backward(
        &self,
        mut dgate_up: ViewMut<'_, T, Self>,
        mut dp: Option<ViewMut<'_, T, Self>>,
        dy: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        p: Option<View<'_, T, Self>>,
        function: GateFunction,
    ) -> Result<()> {
        const KERNEL: &str = "glu_backward";
        let [n, width] = check::glu_backward(KERNEL, &dgate_up, dp.as_ref(), dy, gate_up, p)?;
        let (dy, gate_up, p) = (Mat::from(dy), Mat::from(gate_up), p.map(|p| Mat::from(p).vector()));
        let mut dgate_up = MatMut::from(&mut dgate_up);
        let mut dp = dp.as_mut().map(|dp| MatMut::from(dp).vector());
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| {
                let outputs = (dgate_up.take_rows(r.len()), dp.as_mut().map(|dp| take(dp, r.len())));
                (outputs, dy.row_range(r.clone()), gate_up.row_range(r.clone()), p.map(|p| &p[r]))
            })
            .collect();
        self.for_each(tasks, |((dgate_up, dp), dy, gate_up, p)| {
            backward(dgate_up, dp, dy, gate_up, p, function);
        })
    }

    fn sigmoid_gate(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "sigmoid_gate";
        let [n, width] = check::sigmoid_gate(KERNEL, y.shape(), x, gate)?;
        let (x, gate) = (Mat::from(x), Mat::from(gate));
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| (y.take_rows(r.len()), x.row_range(r.clone()), gate.row_range(r)))
            .collect();
        self.for_each(tasks, |(y, x, gate)| gate_rows(y, x, gate))
    }

    fn sigmoid_gate_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        mut dgate: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        gate: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "sigmoid_gate_backward";
        let [n, width] = check::sigmoid_gate(KERNEL, dx.shape(), x, gate)?;
        check::shape(KERNEL, "dy", [n, width], dy.shape())?;
        check::shape(KERNEL, "dgate", [n, 1], dgate.shape())?;
        let (dy, x, gate) = (Mat::from(dy), Mat::from(x), Mat::from(gate));
        let (mut dx, mut dgate) = (MatMut::from(&mut dx), MatMut::from(&mut dgate));
        let tasks = blocks(n, rows_per_piece(width))
            .map(|r| {
                let outputs = (dx.take_rows(r.len()), dgate.take_rows(r.len()));
                (outputs, dy.row_range(r.clone()), x.row_range(r.clone()), gate.row_range(r))
            })
            .collect();
        self.for_each(tasks, |((dx, dgate), dy, x, gate)| gate_rows_backward(dx, dgate, dy, x, gate))
    }
}
