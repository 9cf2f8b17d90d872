//! Gated activations.

use super::GRADIENT;
use super::host::{Matrix, Random, assert_close, assert_refused, gradient, output, place};
use crate::Float;
use crate::family::Activation;

fn forward(gate_up: &Matrix, p: &Matrix) -> Matrix {
    let width = gate_up.cols / 2;
    Matrix::from_fn(gate_up.rows, width, |i, c| {
        let (g, u) = (gate_up.at(i, c), gate_up.at(i, width + c));
        g / (1.0 + (-g).exp()) * u * p.at(0, i)
    })
}

/// [`Activation`] with and without probabilities, one of them 0.
pub fn activation<T: Float, D: Activation<T>>(device: &D, tolerance: f64) {
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
            let what = format!("{n}×{width}, p {with}");
            let view = with.then(|| pp.view());
            let mut y = output::<T, D>(device, n, width);
            device.swiglu(y.view_mut(), px.view(), view).expect("swiglu");
            assert_close(&format!("swiglu {what}"), &y.read(), &forward(&gate_up, p), tolerance);
            if n * width > 1000 {
                continue;
            }
            let gradient_tolerance = tolerance.max(GRADIENT) * 4.0;
            let want = gradient(&gate_up, |x| forward(x, p).dot(&dy));
            let want_dp = gradient(p, |p| forward(&gate_up, p).dot(&dy));
            for with_dp in [false, true] {
                let (mut dx, mut dp) =
                    (output::<T, D>(device, n, 2 * width), output::<T::Acc, D>(device, 1, n));
                let out = with_dp.then(|| dp.view_mut());
                device
                    .swiglu_backward(dx.view_mut(), out, pdy.view(), px.view(), view)
                    .expect("swiglu_backward");
                assert_close(&format!("dgate_up {what}"), &dx.read(), &want, gradient_tolerance);
                if with_dp {
                    assert_close(&format!("dp {what}"), &dp.read(), &want_dp, gradient_tolerance);
                }
            }
        }
        let mut wrong = output::<T, D>(device, n, width + 1);
        assert_refused("y", device.swiglu(wrong.view_mut(), px.view(), None));
        let long = place::<T::Acc, D>(device, &Matrix::from_fn(1, n + 1, |_, _| 1.0));
        let mut y = output::<T, D>(device, n, width);
        assert_refused("p", device.swiglu(y.view_mut(), px.view(), Some(long.view())));
        let mut wrong = output::<T, D>(device, n, 2 * width + 1);
        let refused = device.swiglu_backward(wrong.view_mut(), None, pdy.view(), px.view(), None);
        assert_refused("dgate_up", refused);
    }
}
