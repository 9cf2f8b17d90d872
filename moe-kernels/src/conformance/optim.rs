//! Optimizer updates.

use std::ops::Range;

use half::bf16;

use super::host::{Matrix, Placed, Random, assert_close, assert_refused, place};
use crate::family::{AdamW, AdamWRun, AdamWSlice, MomentMut, Optim};
use crate::{Device, Float, Tensor};

/// [`Optim`] over several steps, moments kept in either type, elements in several runs and slices.
pub fn optim<T: Float, D: Optim<T>>(device: &D, tolerance: f64) {
    for bf16 in [[false, false], [true, false], [false, true], [true, true]] {
        for n in [0, 1, 37, 320, 10_007, 40_000] {
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

/// A slice on the device: its weights, the low 16 bits of their master weights, and its moments.
struct Slice<T: Float, D: Device> {
    weight: Placed<T, D>,
    remainder: Option<Placed<u16, D>>,
    m: Kept<T::Acc, D>,
    v: Kept<T::Acc, D>,
}

impl<T: Float, D: Device> Slice<T, D> {
    fn new(device: &D, master: &Matrix, bf16: [bool; 2]) -> Self {
        let n = master.cols;
        let split = master.data.iter().map(|&x| T::split(T::Acc::from_f64(x)));
        let (weight, remainder): (Vec<T>, Vec<u16>) = split.unzip();
        let weight = Placed::new(device, 1, n, &weight, T::from_f64(f64::NAN));
        let remainder = (!T::is_acc()).then(|| Placed::new(device, 1, n, &remainder, 0xabcd));
        let [m, v] = bf16.map(|bf16| Kept::zeros(device, n, bf16));
        Slice { weight, remainder, m, v }
    }

    fn with<'a>(&'a mut self, grad: Tensor<T::Acc, D>, runs: &'a [AdamWRun]) -> AdamWSlice<'a, T, D> {
        AdamWSlice {
            weight: self.weight.view_mut(),
            remainder: self.remainder.as_mut().map(Placed::view_mut),
            m: self.m.view_mut(),
            v: self.v.view_mut(),
            grad,
            runs,
        }
    }

    /// Weights and remainders together, of which the weights have to be the nearest.
    fn master(&self) -> Matrix {
        let weights = self.weight.elements();
        let remainders = self.remainder.as_ref().map_or_else(|| vec![0; weights.len()], Placed::elements);
        let masters = weights.iter().zip(remainders).map(|(&weight, remainder)| {
            let master = weight.join(remainder);
            assert_eq!(T::split(master), (weight, remainder), "a weight is its master rounded");
            master.to_f64()
        });
        Matrix::row(&masters.collect::<Vec<_>>())
    }
}

/// A gradient in the middle of NaN.
fn gradient<A: Float, D: Device>(device: &D, grad: &Matrix) -> Tensor<A, D> {
    let around = [f64::NAN; 16];
    let all = [&around[..], &grad.data, &around].concat();
    let all = Tensor::from_f64(device, 1, all.len(), &all).expect("a gradient");
    all.columns(16..16 + grad.cols).expect("it lies inside")
}

/// Of `n` elements: those of two runs with others that are not updated beside them; all, where they are few. Runs begin at
/// even addresses where `n` is of whole 64.
fn runs(n: usize) -> Vec<AdamWRun> {
    let run = |elements, lr_scale, weight_decay| AdamWRun { elements, lr_scale, weight_decay };
    match n {
        0..10 => vec![run(0..n, 1.0, 0.1)],
        _ if n.is_multiple_of(320) => vec![run(0..n / 5 * 2, 1.0, 0.1), run(n / 5 * 2..n - 4, 0.5, 0.0)],
        _ => vec![run(1..n / 3, 1.0, 0.1), run(n / 3..n / 3, 1.0, 0.0), run(n / 3..n - 4, 0.5, 0.0)],
    }
}

/// Elements in one slice, and the same cut into two slices of one call.
fn several_steps<T: Float, D: Optim<T>>(device: &D, n: usize, bf16: [bool; 2], tolerance: f64) {
    let mut random = Random::new(11);
    let mut master = random.matrix::<T::Acc>(1, n);
    let first = master.clone();
    let [mut m, mut v] = [(); 2].map(|()| Matrix::from_fn(1, n, |_, _| 0.0));
    let cut = n / 2;
    let part = |all: &Matrix, range: Range<usize>| Matrix::row(&all.data[range]);
    let mut whole = Slice::<T, D>::new(device, &master, bf16);
    let mut halves = [0..cut, cut..n].map(|half| Slice::<T, D>::new(device, &part(&master, half), bf16));
    let runs = runs(n);
    let runs_of_halves = [0..cut, cut..n].map(|half| {
        let inside = runs.iter().map(|run| {
            let [start, end] =
                [run.elements.start, run.elements.end].map(|at| at.clamp(half.start, half.end) - half.start);
            AdamWRun { elements: start..end, ..run.clone() }
        });
        inside.collect::<Vec<_>>()
    });
    for step in 1..4 {
        let update =
            AdamW { lr: 0.01 * step as f64, beta1: 0.9, beta2: 0.95, eps: 1e-3, step, grad_scale: 0.7 };
        let mut grad = random.matrix::<T::Acc>(1, n);
        if n > 3 {
            grad.data[3] = 0.0;
        }
        let given = || gradient::<T::Acc, D>(device, &grad);
        device.adamw(vec![whole.with(given(), &runs)], &update).expect("adamw");
        for AdamWRun { elements, lr_scale, weight_decay } in &runs {
            for i in elements.clone() {
                let g = grad.data[i] * update.grad_scale;
                m.data[i] = update.beta1 * m.data[i] + (1.0 - update.beta1) * g;
                v.data[i] = update.beta2 * v.data[i] + (1.0 - update.beta2) * g * g;
                let m_hat = m.data[i] / (1.0 - update.beta1.powi(step as i32));
                let v_hat = v.data[i] / (1.0 - update.beta2.powi(step as i32));
                let direction = m_hat / (v_hat.sqrt() + update.eps) + weight_decay * master.data[i];
                master.data[i] -= update.lr * lr_scale * direction;
            }
        }
        let what = |of: &str| format!("{of} of {n} after step {step}, in bf16: {bf16:?}");
        m = whole.m.check(&what("m"), &m, tolerance);
        v = whole.v.check(&what("v"), &v, tolerance);
        let got = whole.master();
        assert_close(&what("master"), &got, &master, tolerance);
        let mut updated = vec![false; n];
        runs.iter().for_each(|run| updated[run.elements.clone()].fill(true));
        for (i, &updated) in updated.iter().enumerate() {
            assert!(updated || got.data[i] == first.data[i], "{}", what("what is in no run"));
        }

        let cuts = halves.iter_mut().zip([0..cut, cut..n]).zip(&runs_of_halves);
        let slices = cuts.map(|((half, range), runs)| half.with(gradient(device, &part(&grad, range)), runs));
        device.adamw(slices.collect(), &update).expect("adamw of two slices");
        let joined: Vec<f64> = halves.iter().flat_map(|half| half.master().data).collect();
        assert_close(&what("the master in two slices"), &Matrix::row(&joined), &got, 0.0);

        let longer = gradient(device, &Matrix::from_fn(1, n + 1, |_, _| 0.0));
        assert_refused("grad", device.adamw(vec![whole.with(longer, &runs)], &update));
        let zeroth = AdamW { step: 0, ..update };
        assert_refused("step 0", device.adamw(vec![whole.with(given(), &runs)], &zeroth));
        let mut other = whole.with(given(), &runs);
        let mut remainder = Placed::new(device, 1, n, &vec![0; n], 0);
        other.remainder = other.remainder.is_none().then(|| remainder.view_mut());
        assert_refused("no remainder, or one too many", device.adamw(vec![other], &update));
        let past = AdamWRun { elements: 0..n + 1, lr_scale: 1.0, weight_decay: 0.0 };
        assert_refused("a run past the end", device.adamw(vec![whole.with(given(), &[past])], &update));
        let twice = [0..1, 0..1].map(|elements| AdamWRun { elements, lr_scale: 1.0, weight_decay: 0.0 });
        assert_refused("elements in two runs", device.adamw(vec![whole.with(given(), &twice)], &update));
    }
    device
        .adamw(Vec::new(), &AdamW { lr: 1.0, beta1: 0.9, beta2: 0.95, eps: 1e-3, step: 1, grad_scale: 1.0 })
        .expect("adamw of nothing");
}
