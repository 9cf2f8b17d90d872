//! Gated activations.

use super::GRADIENT;
use super::host::{Matrix, Random, assert_close, assert_refused, gradient, output, place};
use crate::Float;
use crate::family::{Activation, GateFunction};

/// What a gate's function gives for one element.
pub(super) fn of_gate(function: GateFunction, g: f64) -> f64 {
    match function {
        GateFunction::Silu => g / (1.0 + (-g).exp()),
        GateFunction::GeluTanh => {
            0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh())
        }
    }
}

fn forward(gate_up: &Matrix, p: &Matrix, function: GateFunction) -> Matrix {
    let width = gate_up.cols / 2;
    Matrix::from_fn(gate_up.rows, width, |i, c| {
        of_gate(function, gate_up.at(i, c)) * gate_up.at(i, width + c) * p.at(0, i)
    })
}

/// [`Activation`]: gated linear units with and without probabilities, one of them 0; rows times a sigmoid.
pub fn activation<T: Float, D: Activation<T>>(device: &D, tolerance: f64) {
    for function in [GateFunction::Silu, GateFunction::GeluTanh] {
        glu::<T, D>(device, tolerance, function);
    }
    sigmoid_gate::<T, D>(device, tolerance);
}

fn glu<T: Float, D: Activation<T>>(device: &D, tolerance: f64, function: GateFunction) {
    let mut random = Random::new(8);
    for (n, width) in [(0, 3), (1, 1), (5, 7), (4, 33), (200, 97)] {
        let mut gate_up = random.matrix::<T>(n, 2 * width);
        for (i, x) in gate_up.data.iter_mut().enumerate() {
            *x *= [1.0, 4.0, 16.0][i % 3];
        }
        let mut p = random.matrix::<T::Acc>(1, n);
        if n > 1 {
            p.data[1] = 0.0;
        }
        let dy = random.matrix::<T>(n, width);
        let ones = Matrix::from_fn(1, n, |_, _| 1.0);
        let (px, pp, pdy) =
            (place::<T, D>(device, &gate_up), place::<T::Acc, D>(device, &p), place::<T, D>(device, &dy));
        for (with, p) in [(false, &ones), (true, &p)] {
            let what = format!("{function:?} {n}×{width}, p {with}");
            let view = with.then(|| pp.view());
            let mut y = output::<T, D>(device, n, width);
            device.glu(y.view_mut(), px.view(), view, function).expect("glu");
            assert_close(&format!("glu {what}"), &y.read(), &forward(&gate_up, p, function), tolerance);
            if n * width > 1000 {
                continue;
            }
            let gradient_tolerance = tolerance.max(GRADIENT) * 4.0;
            let want = gradient(&gate_up, |x| forward(x, p, function).dot(&dy));
            let want_dp = gradient(p, |p| forward(&gate_up, p, function).dot(&dy));
            for with_dp in [false, true] {
                let (mut dx, mut dp) =
                    (output::<T, D>(device, n, 2 * width), output::<T::Acc, D>(device, 1, n));
                let out = with_dp.then(|| dp.view_mut());
                device
                    .glu_backward(dx.view_mut(), out, pdy.view(), px.view(), view, function)
                    .expect("glu_backward");
                assert_close(&format!("dgate_up {what}"), &dx.read(), &want, gradient_tolerance);
                if with_dp {
                    assert_close(&format!("dp {what}"), &dp.read(), &want_dp, gradient_tolerance);
                }
            }
        }
        let mut wrong = output::<T, D>(device, n, width + 1);
        assert_refused("y", device.glu(wrong.view_mut(), px.view(), None, function));
        let long = place::<T::Acc, D>(device, &Matrix::from_fn(1, n + 1, |_, _| 1.0));
        let mut y = output::<T, D>(device, n, width);
        assert_refused("p", device.glu(y.view_mut(), px.view(), Some(long.view()), function));
        let mut wrong = output::<T, D>(device, n, 2 * width + 1);
        let refused = device.glu_backward(wrong.view_mut(), None, pdy.view(), px.view(), None, function);
        assert_refused("dgate_up", refused);
    }
}

fn gated(x: &Matrix, gate: &Matrix) -> Matrix {
    Matrix::from_fn(x.rows, x.cols, |i, c| x.at(i, c) / (1.0 + (-gate.at(i, 0)).exp()))
}

fn sigmoid_gate<T: Float, D: Activation<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(19);
    for (n, width) in [(0, 3), (1, 1), (5, 7), (4, 33), (300, 97)] {
        let what = format!("{n}×{width}");
        let (x, mut gate) = (random.matrix::<T>(n, width), random.matrix::<T>(n, 1));
        for (i, g) in gate.data.iter_mut().enumerate() {
            *g *= [1.0, 4.0, 16.0][i % 3];
        }
        let dy = random.matrix::<T>(n, width);
        let (px, pg, pdy) =
            (place::<T, D>(device, &x), place::<T, D>(device, &gate), place::<T, D>(device, &dy));
        let mut y = output::<T, D>(device, n, width);
        device.sigmoid_gate(y.view_mut(), px.view(), pg.view()).expect("sigmoid_gate");
        assert_close(&format!("sigmoid_gate {what}"), &y.read(), &gated(&x, &gate), tolerance);
        let mut wrong = output::<T, D>(device, n, width + 1);
        assert_refused("y", device.sigmoid_gate(wrong.view_mut(), px.view(), pg.view()));
        assert_refused(
            "gate",
            device.sigmoid_gate(y.view_mut(), px.view(), px.view().columns(0..0).unwrap()),
        );

        let (mut dx, mut dgate) = (output::<T, D>(device, n, width), output::<T, D>(device, n, 1));
        let (g, x_view, dy_view) = (pg.view(), px.view(), pdy.view());
        device
            .sigmoid_gate_backward(dx.view_mut(), dgate.view_mut(), dy_view, x_view, g)
            .expect("sigmoid_gate_backward");
        let tolerance = tolerance.max(GRADIENT) * 4.0;
        assert_close(&format!("dx {what}"), &dx.read(), &gated(&dy, &gate), tolerance);
        // A row's gate reaches that row alone.
        let row = |m: &Matrix, i: usize| Matrix::from_fn(1, m.cols, |_, c| m.at(i, c));
        let of_row =
            |i: usize| gradient(&row(&gate, i), |gate| gated(&row(&x, i), gate).dot(&row(&dy, i))).at(0, 0);
        let want = Matrix::from_fn(n, 1, |i, _| of_row(i));
        assert_close(&format!("dgate {what}"), &dgate.read(), &want, tolerance);
        let mut wrong = output::<T, D>(device, n + 1, 1);
        let refused = device.sigmoid_gate_backward(dx.view_mut(), wrong.view_mut(), dy_view, x_view, g);
        assert_refused("dgate", refused);
    }
}
