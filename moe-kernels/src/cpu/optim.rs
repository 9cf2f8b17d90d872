//! Optimizer updates.

use half::bf16;

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::Result;
use crate::check;
use crate::family::{AdamW, AdamWRun, AdamWSlice, MomentMut, Optim};

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
    fn new(h: &AdamW, run: &AdamWRun) -> Self {
        let (step, lr) = (h.step as f64, h.lr * run.lr_scale);
        Factors {
            grad_scale: T::from_f64(h.grad_scale),
            beta1: T::from_f64(h.beta1),
            one_minus_beta1: T::from_f64(1.0 - h.beta1),
            beta2: T::from_f64(h.beta2),
            one_minus_beta2: T::from_f64(1.0 - h.beta2),
            step_size: T::from_f64(lr / (1.0 - h.beta1.powf(step))),
            correction2: T::from_f64(1.0 / (1.0 - h.beta2.powf(step))),
            eps: T::from_f64(h.eps),
            keep: T::from_f64(1.0 - lr * run.weight_decay),
        }
    }
}

simd! {
    fn update<T>(weight: &mut [T], m: &mut [T], v: &mut [T], grad: &[T], f: Factors<T>) {
        for (((weight, m), v), &g) in weight.iter_mut().zip(m).zip(v).zip(grad) {
            let g = g * f.grad_scale;
            *m = f.beta1 * *m + f.one_minus_beta1 * g;
            *v = f.beta2 * *v + f.one_minus_beta2 * (g * g);
            *weight = f.keep * *weight - f.step_size * *m / ((*v * f.correction2).sqrt() + f.eps);
        }
    }
}

/// Elements that are widened at a time.
const CHUNK: usize = 512;

/// A moment's elements, as they are kept.
enum Kept<'a, T> {
    Acc(&'a mut [T]),
    Bf16(&'a mut [bf16]),
}

impl<'a, T: CpuFloat> Kept<'a, T> {
    fn new(moment: &'a mut MomentMut<'_, T, Cpu>) -> Self {
        match moment {
            MomentMut::Acc(view) => Kept::Acc(MatMut::from(view).vector()),
            MomentMut::Bf16(view) => Kept::Bf16(MatMut::from(view).vector()),
        }
    }

    /// Cuts the first `n` elements off.
    fn take(&mut self, n: usize) -> Self {
        match self {
            Kept::Acc(own) => Kept::Acc(take(own, n)),
            Kept::Bf16(own) => Kept::Bf16(take(own, n)),
        }
    }

    /// All elements as `T`: themselves, or widened.
    fn open<'b>(&'b mut self, wide: &'b mut [T; CHUNK]) -> &'b mut [T] {
        match self {
            Kept::Acc(own) => own,
            Kept::Bf16(own) => {
                let wide = &mut wide[..own.len()];
                for (wide, &x) in wide.iter_mut().zip(own.iter()) {
                    *wide = T::from_bf16(x);
                }
                wide
            }
        }
    }

    /// Takes over what became of the widened elements.
    fn close(self, wide: &[T; CHUNK]) {
        if let Kept::Bf16(own) = self {
            for (x, &wide) in own.iter_mut().zip(wide) {
                *x = wide.to_bf16();
            }
        }
    }
}

impl Cpu {
    /// Updates some elements of a slice alike.
    fn update_run<T: CpuFloat>(
        &self,
        slice: &mut AdamWSlice<'_, T, Self>,
        run: &AdamWRun,
        update: &AdamW,
    ) -> Result<()> {
        let factors = Factors::new(update, run);
        let grad = Mat::from(slice.grad.view().columns(run.elements.clone())?).vector();
        let mut weight = &mut MatMut::from(&mut slice.weight).vector()[run.elements.clone()];
        let (mut m, mut v) = (Kept::new(&mut slice.m), Kept::new(&mut slice.v));
        m.take(run.elements.start);
        v.take(run.elements.start);
        let tasks = blocks(run.elements.len(), rows_per_piece(1))
            .map(|r| {
                let len = r.len();
                (take(&mut weight, len), m.take(len), v.take(len), &grad[r])
            })
            .collect();
        self.for_each(tasks, |(mut weight, mut m, mut v, grad)| {
            let (mut wide_m, mut wide_v) = ([T::ZERO; CHUNK], [T::ZERO; CHUNK]);
            for grad in grad.chunks(CHUNK) {
                let len = grad.len();
                let weight = take(&mut weight, len);
                let (mut m, mut v) = (m.take(len), v.take(len));
                self::update(weight, m.open(&mut wide_m), v.open(&mut wide_v), grad, factors);
                m.close(&wide_m);
                v.close(&wide_v);
            }
        })
    }
}

impl<T: CpuFloat> Optim<T> for Cpu {
    fn adamw(&self, slices: Vec<AdamWSlice<'_, T, Self>>, update: &AdamW) -> Result<()> {
        check::adamw("adamw", &slices, update)?;
        for mut slice in slices {
            slice.runs.iter().try_for_each(|run| self.update_run(&mut slice, run, update))?;
        }
        Ok(())
    }
}
