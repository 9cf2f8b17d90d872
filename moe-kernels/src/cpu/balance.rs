//! How often experts are chosen, and the losses made of that.

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut};
use crate::check;
use crate::family::{Balance, BalanceInput, BalanceTerm, BalanceTerms};
use crate::{Result, View, ViewMut};

/// Choices of each expert, and tokens.
fn totals(counts: Mat<'_, i64>) -> (Vec<i64>, i64) {
    let mut sums = vec![0; counts.cols()];
    for row in counts.iter() {
        sums.iter_mut().zip(row).for_each(|(sum, count)| *sum += count);
    }
    let tokens = sums.pop().unwrap_or(0);
    (sums, tokens)
}

/// `factor / tokens²`, 0 without tokens.
fn per_token(factor: f64, tokens: i64) -> f64 {
    if tokens == 0 { 0.0 } else { factor / (tokens as f64).powi(2) }
}

fn factor<D: crate::Device>(term: &BalanceTerm<'_, D>, tokens: i64) -> f64 {
    if term.per_token { per_token(term.factor, tokens) } else { term.factor }
}

impl<T: CpuFloat> Balance<T> for Cpu {
    fn count_choices(&self, mut counts: ViewMut<'_, i64, Self>, experts: View<'_, i32, Self>) -> Result<()> {
        const KERNEL: &str = "count_choices";
        let [sequences, num_experts] = check::count_choices(KERNEL, &counts)?;
        let experts = Mat::from(experts);
        check::indices(KERNEL, "expert", experts.iter().flatten(), num_experts)?;
        let mut counts = MatMut::from(&mut counts);
        for (i, experts) in experts.iter().enumerate() {
            let row = counts.row(i % sequences);
            let mut any = false;
            for &e in experts.iter().filter(|&&e| e >= 0) {
                row[e as usize] += 1;
                any = true;
            }
            row[num_experts] += i64::from(any);
        }
        Ok(())
    }

    fn count_dropped(
        &self,
        mut dropped: ViewMut<'_, f64, Self>,
        experts: View<'_, i32, Self>,
        kept: View<'_, i32, Self>,
    ) -> Result<()> {
        check::count_dropped("count_dropped", &dropped, experts, kept)?;
        let pairs = Mat::from(experts).iter().flatten().zip(Mat::from(kept).iter().flatten());
        let count = pairs.filter(|&(&before, &after)| before >= 0 && after < 0).count();
        MatMut::from(&mut dropped).vector()[0] += count as f64;
        Ok(())
    }

    fn sum_counts(&self, mut sums: ViewMut<'_, i64, Self>, counts: View<'_, i64, Self>) -> Result<()> {
        check::sum_counts("sum_counts", &sums, counts)?;
        let (own, _) = totals(counts.into());
        MatMut::from(&mut sums).vector().iter_mut().zip(own).for_each(|(sum, count)| *sum += count);
        Ok(())
    }

    fn balance_sums(&self, mut sums: ViewMut<'_, f64, Self>, input: BalanceInput<'_, T, Self>) -> Result<()> {
        let [_, experts] = check::balance_sums("balance_sums", &sums, &input)?;
        let BalanceInput { own, unit, chosen, probs, top_k } = input;
        let (unit, probs) = (Mat::from(unit), Mat::from(probs));
        let (own, _) = totals(own.into());
        let chosen = chosen.map_or_else(|| own.clone(), |chosen| totals(chosen.into()).0);
        let sums = MatMut::from(&mut sums).vector();
        let (by_expert, losses) = sums.split_at_mut(3 * experts);
        by_expert[..experts].iter_mut().zip(&chosen).for_each(|(sum, &count)| *sum += count as f64);
        by_expert[experts..2 * experts].iter_mut().zip(&own).for_each(|(sum, &count)| *sum += count as f64);
        let mut shares = vec![0.0; experts];
        for row in probs.iter() {
            shares.iter_mut().zip(row).for_each(|(sum, p)| *sum += p.to_f64());
        }
        by_expert[2 * experts..].iter_mut().zip(&shares).for_each(|(sum, p)| *sum += p);

        let scale = experts as f64 / top_k as f64;
        let (counts, tokens) = totals(unit);
        let products = shares.iter().zip(&counts).map(|(p, &count)| p * count as f64);
        losses[0] += per_token(scale, tokens) * products.sum::<f64>();
        for (counts, probs) in unit.iter().zip(probs.iter()) {
            let products = probs.iter().zip(counts).map(|(p, &count)| p.to_f64() * count as f64);
            losses[1] += per_token(scale, counts[experts]) * products.sum::<f64>();
        }
        Ok(())
    }

    fn balance_gradient(
        &self,
        mut gradient: ViewMut<'_, T, Self>,
        terms: BalanceTerms<'_, Self>,
    ) -> Result<()> {
        let [_, experts] = check::balance_gradient("balance_gradient", &gradient, &terms)?;
        let BalanceTerms { unit, micro_batch, sequence, step, model } = terms;
        let unit = Mat::from(unit);
        let (counts, tokens) = totals(unit);
        let of_micro_batch = per_token(micro_batch, tokens);
        let mut shared: Vec<f64> = counts.iter().map(|&count| of_micro_batch * count as f64).collect();
        for term in [step, model].into_iter().flatten() {
            let factor = factor(&term, tokens);
            let counts = Mat::from(term.counts).vector();
            shared.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += factor * count as f64);
        }
        let mut gradient = MatMut::from(&mut gradient);
        for (s, counts) in unit.iter().enumerate() {
            let of_sequence = per_token(sequence, counts[experts]);
            for ((gradient, shared), &count) in gradient.row(s).iter_mut().zip(&shared).zip(counts) {
                *gradient = T::from_f64(shared + of_sequence * count as f64);
            }
        }
        Ok(())
    }

    fn balance_dot(
        &self,
        mut sum: ViewMut<'_, f64, Self>,
        probs: View<'_, T, Self>,
        unit: View<'_, i64, Self>,
        term: BalanceTerm<'_, Self>,
    ) -> Result<()> {
        check::balance_dot("balance_dot", &sum, probs, unit, &term)?;
        let (probs, counts) = (Mat::from(probs), Mat::from(term.counts).vector());
        let factor = factor(&term, totals(unit.into()).1);
        let products = counts.iter().enumerate().map(|(e, &count)| {
            let share: f64 = probs.iter().map(|row| row[e].to_f64()).sum();
            count as f64 * share
        });
        MatMut::from(&mut sum).vector()[0] += factor * products.sum::<f64>();
        Ok(())
    }
}
