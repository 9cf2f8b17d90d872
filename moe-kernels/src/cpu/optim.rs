//! Optimizer updates.

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::{AdamW, Optim};
use crate::{Result, View, ViewMut};

/// The factors of one update, rounded to the type of the moments.
#[derive(Clone, Copy)]
struct Factors<T> {
    grad_scale: T,
    beta1: T,
    one_minus_beta1: T,
    beta2: T,
    one_minus_beta2: T,
    /// `lr / (1 − β1^step)`.
    step_size: T,
    /// `1 / (1 − β2^step)`.
    correction2: T,
    eps: T,
    /// `1 − lr · λ`.
    keep: T,
}

impl<T: CpuFloat> Factors<T> {
    fn new(h: &AdamW) -> Self {
        let step = h.step as f64;
        Factors {
            grad_scale: T::from_f64(h.grad_scale),
            beta1: T::from_f64(h.beta1),
            one_minus_beta1: T::from_f64(1.0 - h.beta1),
            beta2: T::from_f64(h.beta2),
            one_minus_beta2: T::from_f64(1.0 - h.beta2),
            step_size: T::from_f64(h.lr / (1.0 - h.beta1.powf(step))),
            correction2: T::from_f64(1.0 / (1.0 - h.beta2.powf(step))),
            eps: T::from_f64(h.eps),
            keep: T::from_f64(1.0 - h.lr * h.weight_decay),
        }
    }
}

simd! {
    fn update<T>(weight: &mut [T], master: &mut [T], m: &mut [T], v: &mut [T], grad: &[T], f: Factors<T>) {
        for ((((weight, master), m), v), &g) in weight.iter_mut().zip(master).zip(m).zip(v).zip(grad) {
            let g = g * f.grad_scale;
            *m = f.beta1 * *m + f.one_minus_beta1 * g;
            *v = f.beta2 * *v + f.one_minus_beta2 * (g * g);
            *master = f.keep * *master - f.step_size * *m / ((*v * f.correction2).sqrt() + f.eps);
            *weight = *master;
        }
    }
}

impl<T: CpuFloat> Optim<T> for Cpu {
    fn adamw(
        &self,
        mut weight: ViewMut<'_, T, Self>,
        mut master: ViewMut<'_, T, Self>,
        mut m: ViewMut<'_, T, Self>,
        mut v: ViewMut<'_, T, Self>,
        grad: View<'_, T, Self>,
        hyper: &AdamW,
    ) -> Result<()> {
        const KERNEL: &str = "adamw";
        let [_, n] = grad.shape();
        check::shape(KERNEL, "grad", [1, n], grad.shape())?;
        check::shape(KERNEL, "weight", [1, n], weight.shape())?;
        check::shape(KERNEL, "master", [1, n], master.shape())?;
        check::shape(KERNEL, "m", [1, n], m.shape())?;
        check::shape(KERNEL, "v", [1, n], v.shape())?;
        check::argument(KERNEL, hyper.step > 0, || "updates are numbered from 1".to_owned())?;
        let factors = Factors::new(hyper);
        let grad = Mat::from(grad).vector();
        let (mut weight, mut master) =
            (MatMut::from(&mut weight).vector(), MatMut::from(&mut master).vector());
        let (mut m, mut v) = (MatMut::from(&mut m).vector(), MatMut::from(&mut v).vector());
        let tasks = blocks(n, rows_per_piece(1))
            .map(|r| {
                let len = r.len();
                (
                    take(&mut weight, len),
                    take(&mut master, len),
                    take(&mut m, len),
                    take(&mut v, len),
                    &grad[r],
                )
            })
            .collect();
        self.for_each(tasks, |(weight, master, m, v, grad)| update(weight, master, m, v, grad, factors))
    }
}
