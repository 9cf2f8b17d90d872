//! Optimizer updates.

use half::bf16;

use super::host::{Matrix, Placed, Random, assert_close, assert_refused, place};
use crate::family::{AdamW, MomentMut, Optim};
use crate::{Device, Float};

/// [`Optim`] over several steps, moments kept in either type.
pub fn optim<T: Float, D: Optim<T>>(device: &D, tolerance: f64) {
    for bf16 in [[false, false], [true, false], [false, true], [true, true]] {
        for n in [0, 1, 37, 40_000] {
            several_steps::<T, D>(device, n, bf16, tolerance);
        }
    }
}

/// A moment on the device.
enum Kept<A: Float, D: Device> {
    Acc(Placed<A, D>),
    Bf16(Placed<bf16, D>),
}

impl<A: Float, D: Device> Kept<A, D> {
    fn zeros(device: &D, n: usize, bf16: bool) -> Self {
        let zeros = Matrix::from_fn(1, n, |_, _| 0.0);
        if bf16 { Kept::Bf16(place(device, &zeros)) } else { Kept::Acc(place(device, &zeros)) }
    }

    fn view_mut(&mut self) -> MomentMut<'_, A, D> {
        match self {
            Kept::Acc(own) => MomentMut::Acc(own.view_mut()),
            Kept::Bf16(own) => MomentMut::Bf16(own.view_mut()),
        }
    }

    /// Checks what is kept of `exact`, which the device computed within `tolerance`, and returns it.
    #[track_caller]
    fn check(&self, what: &str, exact: &Matrix, tolerance: f64) -> Matrix {
        match self {
            Kept::Acc(own) => {
                let got = own.read();
                assert_close(what, &got, exact, tolerance);
                got
            }
            Kept::Bf16(own) => {
                let got = own.read();
                let largest = exact.data.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                for (&got, &x) in got.data.iter().zip(&exact.data) {
                    let near = [x - tolerance * largest, x, x + tolerance * largest].map(nearest_bf16);
                    let inside = near[0].min(near[2]) <= got && got <= near[0].max(near[2]);
                    assert!(inside, "{what}: {got:e} is not {x:e} rounded, {:e}", near[1]);
                }
                got
            }
        }
    }
}

/// Eight bits, ties to even.
fn nearest_bf16(x: f64) -> f64 {
    if x == 0.0 {
        return x;
    }
    let unit = 2f64.powi((x.abs().log2().floor() as i32).max(-126) - 7);
    (x / unit).round_ties_even() * unit
}

fn several_steps<T: Float, D: Optim<T>>(device: &D, n: usize, bf16: [bool; 2], tolerance: f64) {
    let mut random = Random::new(11);
    let mut master = random.matrix::<T::Acc>(1, n);
    let mut weight = place::<T, D>(device, &Matrix::from_fn(1, n, |_, _| f64::NAN));
    let mut pmaster = place::<T::Acc, D>(device, &master);
    let [mut pm, mut pv] = bf16.map(|bf16| Kept::<T::Acc, D>::zeros(device, n, bf16));
    let [mut m, mut v] = [(); 2].map(|()| Matrix::from_fn(1, n, |_, _| 0.0));
    let mut own = place::<T::Acc, D>(device, &master);
    let [mut own_m, mut own_v] = bf16.map(|bf16| Kept::<T::Acc, D>::zeros(device, n, bf16));
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
            .adamw(Some(weight.view_mut()), pmaster.view_mut(), pm.view_mut(), pv.view_mut(), pg.view(), &h)
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
        let what = |of: &str| format!("{of} of {n} after step {step}, in bf16: {bf16:?}");
        m = pm.check(&what("m"), &m, tolerance);
        v = pv.check(&what("v"), &v, tolerance);
        assert_close(&what("master"), &pmaster.read(), &master, tolerance);
        let rounded =
            Matrix::row(&pmaster.read().data.iter().map(|&x| T::from_f64(x).to_f64()).collect::<Vec<_>>());
        assert_close(&what("weight"), &weight.read(), &rounded, 0.0);

        device
            .adamw(None, own.view_mut(), own_m.view_mut(), own_v.view_mut(), pg.view(), &h)
            .expect("adamw of weights that are their own master");
        assert_close(&what("the master alone"), &own.read(), &pmaster.read(), 0.0);

        let longer = place::<T::Acc, D>(device, &Matrix::from_fn(1, n + 1, |_, _| 0.0));
        let refused = device.adamw(
            Some(weight.view_mut()),
            pmaster.view_mut(),
            pm.view_mut(),
            pv.view_mut(),
            longer.view(),
            &h,
        );
        assert_refused("grad", refused);
        let zeroth = AdamW { step: 0, ..h };
        let refused = device.adamw(
            Some(weight.view_mut()),
            pmaster.view_mut(),
            pm.view_mut(),
            pv.view_mut(),
            pg.view(),
            &zeroth,
        );
        assert_refused("step 0", refused);
    }
}
