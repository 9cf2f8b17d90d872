//! Optimizer updates.

use super::host::{Matrix, Random, assert_close, assert_refused, place};
use crate::Float;
use crate::family::{AdamW, Optim};

/// [`Optim`] over several steps.
pub fn optim<T: Float, D: Optim<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(11);
    for n in [0, 1, 37, 40_000] {
        let mut master = random.matrix::<T::Acc>(1, n);
        let (mut m, mut v) = (Matrix::from_fn(1, n, |_, _| 0.0), Matrix::from_fn(1, n, |_, _| 0.0));
        let mut weight = place::<T, D>(device, &Matrix::from_fn(1, n, |_, _| f64::NAN));
        let (mut pmaster, mut pm, mut pv) = (
            place::<T::Acc, D>(device, &master),
            place::<T::Acc, D>(device, &m),
            place::<T::Acc, D>(device, &v),
        );
        for step in 1..4 {
            let h = AdamW {
                lr: 0.01 * step as f64,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-3,
                weight_decay: 0.1,
                step,
                grad_scale: 0.7,
            };
            let mut grad = random.matrix::<T::Acc>(1, n);
            if n > 3 {
                grad.data[3] = 0.0;
            }
            let pg = place::<T::Acc, D>(device, &grad);
            device
                .adamw(weight.view_mut(), pmaster.view_mut(), pm.view_mut(), pv.view_mut(), pg.view(), &h)
                .expect("adamw");
            for i in 0..n {
                let g = grad.data[i] * h.grad_scale;
                m.data[i] = h.beta1 * m.data[i] + (1.0 - h.beta1) * g;
                v.data[i] = h.beta2 * v.data[i] + (1.0 - h.beta2) * g * g;
                let m_hat = m.data[i] / (1.0 - h.beta1.powi(step as i32));
                let v_hat = v.data[i] / (1.0 - h.beta2.powi(step as i32));
                let direction = m_hat / (v_hat.sqrt() + h.eps) + h.weight_decay * master.data[i];
                master.data[i] -= h.lr * direction;
            }
            let what = |of: &str| format!("{of} of {n} after step {step}");
            assert_close(&what("m"), &pm.read(), &m, tolerance);
            assert_close(&what("v"), &pv.read(), &v, tolerance);
            assert_close(&what("master"), &pmaster.read(), &master, tolerance);
            let rounded = Matrix::row(
                &pmaster.read().data.iter().map(|&x| T::from_f64(x).to_f64()).collect::<Vec<_>>(),
            );
            assert_close(&what("weight"), &weight.read(), &rounded, 0.0);

            let longer = place::<T::Acc, D>(device, &Matrix::from_fn(1, n + 1, |_, _| 0.0));
            let refused = device.adamw(
                weight.view_mut(),
                pmaster.view_mut(),
                pm.view_mut(),
                pv.view_mut(),
                longer.view(),
                &h,
            );
            assert_refused("grad", refused);
            let zeroth = AdamW { step: 0, ..h };
            let refused = device.adamw(
                weight.view_mut(),
                pmaster.view_mut(),
                pm.view_mut(),
                pv.view_mut(),
                pg.view(),
                &zeroth,
            );
            assert_refused("step 0", refused);
        }
    }
}
