//! Router scores, choice and sorting.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::{Routing, ScoreFunction};
use crate::{Error, Result, View, ViewMut};

/// Whether the weights are those of a softmax over the chosen experts alone. That is the softmax over all, divided by
/// the sum over the chosen: `SoftmaxPost` and a normalised `SoftmaxPre` are one function.
fn over_chosen(score: ScoreFunction) -> bool {
    match score {
        ScoreFunction::SoftmaxPost => true,
        ScoreFunction::SoftmaxPre { normalize } => normalize,
    }
}

/// The experts of the largest logits in descending order, ties to the smaller id.
fn choose(chosen: &mut [i32], logits: &[impl CpuFloat]) {
    let mut count = 0;
    for (e, &x) in logits.iter().enumerate() {
        let at = chosen[..count].iter().position(|&c| logits[c as usize] < x).unwrap_or(count);
        if at < chosen.len() {
            count = (count + 1).min(chosen.len());
            chosen[at..count].rotate_right(1);
            chosen[at] = e as i32;
        }
    }
}

/// What [`Routing::route`] writes, for some of the tokens.
struct Routes<'a, T> {
    weights: MatMut<'a, T>,
    experts: MatMut<'a, i32>,
    probs: MatMut<'a, T>,
    lse: &'a mut [T],
}

simd! {
    /// Returns the first token whose logits have no softmax.
    fn route<T>(out: Routes<'_, T>, logits: Mat<'_, T>, over_chosen: bool) -> Option<usize> {
        for (i, logits) in logits.iter().enumerate() {
            let probs = out.probs.row(i);
            let max = logits.iter().fold(T::NEG_INFINITY, |max, &x| if max < x { x } else { max });
            let mut sum = T::ZERO;
            for (p, &x) in probs.iter_mut().zip(logits) {
                *p = (x - max).exp();
                sum += *p;
            }
            out.lse[i] = max + sum.ln();
            if !out.lse[i].is_finite() {
                return Some(i);
            }
            for p in &mut *probs {
                *p = *p / sum;
            }
            let (weights, chosen) = (out.weights.row(i), out.experts.row(i));
            choose(chosen, logits);
            let mut total = T::ZERO;
            for (w, &e) in weights.iter_mut().zip(&*chosen) {
                *w = probs[e as usize];
                total += *w;
            }
            if over_chosen {
                for w in weights {
                    *w = *w / total;
                }
            }
        }
        None
    }
}

/// What [`Routing::route_backward`] reads, for some of the tokens.
struct Routed<'a, T> {
    dweights: Mat<'a, T>,
    weights: Mat<'a, T>,
    experts: Mat<'a, i32>,
    probs: Mat<'a, T>,
    lse: &'a [T],
}

simd! {
    /// Every part is the gradient of a softmax `s`, `s ⊙ (d − Σ s ⊙ d)`, or `d lse / d logits = probs`.
    fn backward<T>(dlogits: MatMut<'_, T>, routed: Routed<'_, T>, over_chosen: bool, aux: &[T], two_z: T) {
        for (i, &lse) in routed.lse.iter().enumerate() {
            let (dlogits, probs) = (dlogits.row(i), routed.probs.row(i));
            let (dweights, weights) = (routed.dweights.row(i), routed.weights.row(i));
            let experts = routed.experts.row(i);

            let mut mean = T::ZERO;
            for (&p, &a) in probs.iter().zip(aux) {
                mean += p * a;
            }
            let mut mean_chosen = T::ZERO;
            for (&w, &d) in weights.iter().zip(dweights) {
                mean_chosen += w * d;
            }
            if !over_chosen {
                mean += mean_chosen;
            }
            for ((d, &p), &a) in dlogits.iter_mut().zip(probs).zip(aux) {
                *d = p * (a - mean + two_z * lse);
            }
            for ((&e, &w), &d) in experts.iter().zip(weights).zip(dweights) {
                dlogits[e as usize] += if over_chosen { w * (d - mean_chosen) } else { w * d };
            }
        }
    }
}

impl<T: CpuFloat> Routing<T> for Cpu {
    fn route(
        &self,
        mut weights: ViewMut<'_, T, Self>,
        mut experts: ViewMut<'_, i32, Self>,
        mut probs: ViewMut<'_, T, Self>,
        mut lse: ViewMut<'_, T, Self>,
        logits: View<'_, T, Self>,
        score: ScoreFunction,
    ) -> Result<()> {
        const KERNEL: &str = "route";
        let [n, count] = logits.shape();
        let [_, k] = weights.shape();
        check::shape(KERNEL, "weights", [n, k], weights.shape())?;
        check::shape(KERNEL, "experts", [n, k], experts.shape())?;
        check::shape(KERNEL, "probs", [n, count], probs.shape())?;
        check::shape(KERNEL, "lse", [1, n], lse.shape())?;
        check::argument(KERNEL, (1..=count).contains(&k), || {
            format!("{k} of {count} experts cannot be chosen")
        })?;
        let logits = Mat::from(logits);
        let (mut weights, mut experts) = (MatMut::from(&mut weights), MatMut::from(&mut experts));
        let (mut probs, mut lse) = (MatMut::from(&mut probs), MatMut::from(&mut lse).vector());
        let tasks = blocks(n, rows_per_piece(8 * count))
            .map(|r| {
                let out = Routes {
                    weights: weights.take_rows(r.len()),
                    experts: experts.take_rows(r.len()),
                    probs: probs.take_rows(r.len()),
                    lse: take(&mut lse, r.len()),
                };
                (r, out)
            })
            .collect();
        let failed = AtomicUsize::new(usize::MAX);
        self.for_each(tasks, |(r, out)| {
            if let Some(i) = route(out, logits.row_range(r.clone()), over_chosen(score)) {
                failed.fetch_min(r.start + i, Ordering::Relaxed);
            }
        })?;
        match failed.into_inner() {
            usize::MAX => Ok(()),
            row => Err(Error::NotANumber { kernel: KERNEL, row }),
        }
    }

    fn route_backward(
        &self,
        mut dlogits: ViewMut<'_, T, Self>,
        dweights: View<'_, T, Self>,
        weights: View<'_, T, Self>,
        experts: View<'_, i32, Self>,
        probs: View<'_, T, Self>,
        lse: View<'_, T, Self>,
        score: ScoreFunction,
        aux: View<'_, T, Self>,
        z: f64,
    ) -> Result<()> {
        const KERNEL: &str = "route_backward";
        let [n, count] = dlogits.shape();
        let [_, k] = weights.shape();
        check::shape(KERNEL, "dweights", [n, k], dweights.shape())?;
        check::shape(KERNEL, "weights", [n, k], weights.shape())?;
        check::shape(KERNEL, "experts", [n, k], experts.shape())?;
        check::shape(KERNEL, "probs", [n, count], probs.shape())?;
        check::shape(KERNEL, "lse", [1, n], lse.shape())?;
        check::shape(KERNEL, "aux", [1, count], aux.shape())?;
        let (dweights, weights, experts) = (Mat::from(dweights), Mat::from(weights), Mat::from(experts));
        let (probs, lse, aux) = (Mat::from(probs), Mat::from(lse).vector(), Mat::from(aux).vector());
        let chosen = experts.iter().flatten();
        check::argument(KERNEL, chosen.clone().all(|&e| e >= 0), || {
            "a chosen expert is negative".to_owned()
        })?;
        check::indices(KERNEL, "expert", chosen, count)?;
        let mut dlogits = MatMut::from(&mut dlogits);
        let tasks = blocks(n, rows_per_piece(8 * count))
            .map(|r| {
                let routed = Routed {
                    dweights: dweights.row_range(r.clone()),
                    weights: weights.row_range(r.clone()),
                    experts: experts.row_range(r.clone()),
                    probs: probs.row_range(r.clone()),
                    lse: &lse[r.clone()],
                };
                (dlogits.take_rows(r.len()), routed)
            })
            .collect();
        self.for_each(tasks, |(dlogits, routed)| {
            backward(dlogits, routed, over_chosen(score), aux, T::from_f64(2.0 * z));
        })
    }

    fn sort_by_expert(
        &self,
        mut order: ViewMut<'_, i32, Self>,
        mut position: ViewMut<'_, i32, Self>,
        mut offsets: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "sort_by_expert";
        let [n, k] = experts.shape();
        let entries = offsets.shape()[1];
        check::shape(KERNEL, "offsets", [1, entries.max(1)], offsets.shape())?;
        check::shape(KERNEL, "order", [1, n * k], order.shape())?;
        check::shape(KERNEL, "position", [n, k], position.shape())?;
        check::argument(KERNEL, n * k <= i32::MAX as usize, || format!("{n} · {k} choices overflow an i32"))?;
        let experts = Mat::from(experts);
        check::indices(KERNEL, "expert", experts.iter().flatten(), entries - 1)?;
        let (order, offsets) = (MatMut::from(&mut order).vector(), MatMut::from(&mut offsets).vector());
        let mut position = MatMut::from(&mut position);

        // Counts, then first positions.
        let mut next = vec![0; entries];
        for &e in experts.iter().flatten().filter(|&&e| e >= 0) {
            next[e as usize + 1] += 1;
        }
        for e in 1..entries {
            next[e] += next[e - 1];
        }
        offsets.copy_from_slice(&next);

        order.fill(-1);
        for (i, experts) in experts.iter().enumerate() {
            for (j, (position, &e)) in position.row(i).iter_mut().zip(experts).enumerate() {
                *position = -1;
                if e >= 0 {
                    let slot = &mut next[e as usize];
                    *position = *slot;
                    order[*slot as usize] = (i * k + j) as i32;
                    *slot += 1;
                }
            }
        }
        Ok(())
    }
}
