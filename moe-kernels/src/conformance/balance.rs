//! How often experts are chosen, and the losses made of that.

use super::host::{
    Matrix, Placed, Random, assert_close, assert_data_refused, assert_refused, output, place, place_elements,
    place_ints,
};
use crate::family::{Balance, BalanceInput, BalanceTerm, BalanceTerms};
use crate::{Device, Float};

/// Choices of tokens by sequence, as rows of counts and tokens, by the definition.
fn counted(experts: &[i32], [n, k]: [usize; 2], sequences: usize, num_experts: usize) -> Vec<i64> {
    let width = num_experts + 1;
    let mut counts = vec![0; sequences * width];
    for i in 0..n {
        let own = &experts[i * k..(i + 1) * k];
        let row = &mut counts[i % sequences * width..][..width];
        (0..num_experts).for_each(|e| row[e] += own.iter().filter(|&&x| x == e as i32).count() as i64);
        row[num_experts] += i64::from(own.iter().any(|&e| e >= 0));
    }
    counts
}

fn place_counts<D: Device>(device: &D, rows: usize, cols: usize, counts: &[i64]) -> Placed<i64, D> {
    place_elements(device, rows, cols, counts, i64::MAX)
}

/// Rows of counts: choices and tokens.
struct Counts<'a> {
    of: &'a [i64],
    num_experts: usize,
}

impl Counts<'_> {
    fn at(&self, s: usize, e: usize) -> f64 {
        self.of[s * (self.num_experts + 1) + e] as f64
    }

    fn tokens(&self, s: usize) -> f64 {
        self.at(s, self.num_experts)
    }

    fn sequences(&self) -> usize {
        self.of.len() / (self.num_experts + 1)
    }

    /// Choices of an expert in all sequences; of the expert behind the last, their tokens.
    fn all(&self, e: usize) -> f64 {
        (0..self.sequences()).map(|s| self.at(s, e)).sum()
    }

    fn all_tokens(&self) -> f64 {
        self.all(self.num_experts)
    }
}

fn per(factor: f64, tokens: f64) -> f64 {
    if tokens == 0.0 { 0.0 } else { factor / (tokens * tokens) }
}

/// [`Balance`]: counts with padding and dropped choices, statistics, losses, their gradients.
pub fn balance<A: Float<Acc = A>, D: Balance<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(21);
    // Tokens, choices, experts, sequences; the last two have more counts than a block may keep to itself, and more tokens than fill it.
    for (n, k, num_experts, sequences) in
        [(0, 2, 4, 1), (1, 1, 1, 1), (12, 2, 6, 3), (700, 4, 60, 2), (300, 3, 500, 30), (60_000, 2, 8, 4)]
    {
        let what = format!("{n} tokens, {k} of {num_experts}, {sequences} sequences");
        let width = num_experts + 1;
        let mut experts = Vec::new();
        for i in 0..n {
            let first = random.below(num_experts);
            experts.extend((0..k).map(|j| ((first + j) % num_experts) as i32));
            match i % 5 {
                1 => experts[i * k..].fill(-1),
                2 => experts[i * k] = -2,
                _ => {}
            }
        }
        let counts = counted(&experts, [n, k], sequences, num_experts);
        let placed = place_ints(device, n, k, &experts);
        let mut got = place_counts(device, sequences, width, &vec![5; sequences * width]);
        Balance::<A>::count_choices(device, got.view_mut(), placed.view()).expect("count_choices");
        let want: Vec<i64> = counts.iter().map(|count| count + 5).collect();
        assert_eq!(got.elements(), want, "counts, {what}");

        let mut sums = place_counts(device, 1, num_experts, &vec![3; num_experts]);
        let pc = place_counts(device, sequences, width, &counts);
        Balance::<A>::sum_counts(device, sums.view_mut(), pc.view()).expect("sum_counts");
        let of = Counts { of: &counts, num_experts };
        let want: Vec<i64> = (0..num_experts).map(|e| 3 + of.all(e) as i64).collect();
        assert_eq!(sums.elements(), want, "sums of counts, {what}");

        let kept: Vec<i32> =
            experts.iter().enumerate().map(|(c, &e)| if c % 3 == 0 { -1 } else { e }).collect();
        let lost = experts.iter().zip(&kept).filter(|&(&before, &after)| before >= 0 && after < 0).count();
        let mut dropped = place::<f64, D>(device, &Matrix::row(&[7.0]));
        let pk = place_ints(device, n, k, &kept);
        Balance::<A>::count_dropped(device, dropped.view_mut(), placed.view(), pk.view())
            .expect("count_dropped");
        assert_eq!(dropped.read().data, [7.0 + lost as f64], "dropped, {what}");

        losses::<A, D>(device, &mut random, &counts, [sequences, num_experts, k], tolerance, &what);
    }
    refusals::<A, D>(device);
}

fn losses<A: Float<Acc = A>, D: Balance<A>>(
    device: &D,
    random: &mut Random,
    own: &[i64],
    [sequences, num_experts, k]: [usize; 3],
    tolerance: f64,
    what: &str,
) {
    let width = num_experts + 1;
    let mut draw = |n: usize| random.ints(n, 50).into_iter().map(i64::from).collect::<Vec<_>>();
    let others = draw(own.len());
    // One sequence of the unit has no tokens.
    let unit: Vec<i64> = own.iter().zip(others).map(|(own, other)| own + other).collect();
    let unit: Vec<i64> =
        unit.iter().enumerate().map(|(c, &n)| if sequences > 1 && c < width { 0 } else { n }).collect();
    let (chosen, step, model) = (draw(width), draw(num_experts), draw(num_experts));
    let probs = random.matrix::<A>(sequences, num_experts);
    let place = |rows, cols, of: &[i64]| place_counts(device, rows, cols, of);
    let (p_own, p_unit) = (place(sequences, width, own), place(sequences, width, &unit));
    let (p_chosen, p_step, p_model) =
        (place(1, width, &chosen), place(1, num_experts, &step), place(1, num_experts, &model));
    let p_probs = super::host::place::<A, D>(device, &probs);
    let (own, unit) = (Counts { of: own, num_experts }, Counts { of: &unit, num_experts });
    let share = |e: usize| (0..sequences).map(|s| probs.at(s, e)).sum::<f64>();

    let scale = num_experts as f64 / k as f64;
    let whole: f64 = (0..num_experts).map(|e| share(e) * unit.all(e)).sum();
    let by_sequence: f64 = (0..sequences)
        .map(|s| {
            let sum: f64 = (0..num_experts).map(|e| probs.at(s, e) * unit.at(s, e)).sum();
            per(scale, unit.tokens(s)) * sum
        })
        .sum();
    for with in [None, Some(&p_chosen)] {
        let before: Vec<f64> = (0..3 * num_experts + 2).map(|i| i as f64 / 8.0).collect();
        let mut sums = super::host::place::<f64, D>(device, &Matrix::row(&before));
        let input = BalanceInput {
            own: p_own.view(),
            unit: p_unit.view(),
            chosen: with.map(Placed::view),
            probs: p_probs.view(),
            top_k: k,
        };
        device.balance_sums(sums.view_mut(), input).expect("balance_sums");
        let got = sums.read().data;
        let added: Vec<f64> = got.iter().zip(&before).map(|(got, before)| got - before).collect();
        for e in 0..num_experts {
            let chose = if with.is_some() { chosen[e] as f64 } else { own.all(e) };
            assert_eq!((added[e], added[num_experts + e]), (chose, own.all(e)), "counts of {e}, {what}");
        }
        let shares: Vec<f64> = (0..num_experts).map(share).collect();
        let close = |name: &str, got: &[f64], want: &[f64]| {
            assert_close(&format!("{name}, {what}"), &Matrix::row(got), &Matrix::row(want), 1e-10);
        };
        close("shares", &added[2 * num_experts..3 * num_experts], &shares);
        close("loss", &added[3 * num_experts..3 * num_experts + 1], &[per(scale, unit.all_tokens()) * whole]);
        close("loss of sequences", &added[3 * num_experts + 1..], &[by_sequence]);
    }

    for (per_token, with) in [(false, false), (false, true), (true, true)] {
        let term = |counts: &'static str| {
            let (placed, factor) = if counts == "step" { (&p_step, 0.3) } else { (&p_model, 0.7) };
            BalanceTerm { counts: placed.view(), factor, per_token: per_token && counts == "model" }
        };
        let terms = BalanceTerms {
            unit: p_unit.view(),
            micro_batch: 1.5,
            sequence: 2.5,
            step: with.then(|| term("step")),
            model: with.then(|| term("model")),
        };
        let mut gradient = output::<A, D>(device, sequences, num_experts);
        device.balance_gradient(gradient.view_mut(), terms).expect("balance_gradient");
        let tokens = unit.all_tokens();
        let of_model = if per_token { per(0.7, tokens) } else { 0.7 };
        let want = Matrix::from_fn(sequences, num_experts, |s, e| {
            let others = 0.3 * step[e] as f64 + of_model * model[e] as f64;
            per(1.5, tokens) * unit.all(e)
                + per(2.5, unit.tokens(s)) * unit.at(s, e)
                + if with { others } else { 0.0 }
        });
        assert_close(&format!("gradient, {what}"), &gradient.read(), &want, tolerance);

        let mut sum = super::host::place::<f64, D>(device, &Matrix::row(&[0.5]));
        device
            .balance_dot(sum.view_mut(), p_probs.view(), p_unit.view(), term("model"))
            .expect("balance_dot");
        let dot: f64 = (0..num_experts).map(|e| share(e) * model[e] as f64).sum();
        let want = Matrix::row(&[0.5 + of_model * dot]);
        assert_close(&format!("loss of all layers, {what}"), &sum.read(), &want, 1e-10);
    }
}

fn refusals<A: Float<Acc = A>, D: Balance<A>>(device: &D) {
    let experts = place_ints(device, 2, 1, &[0, 3]);
    let mut counts = place_counts(device, 1, 4, &[0; 4]);
    let outside = Balance::<A>::count_choices(device, counts.view_mut(), experts.view());
    assert_data_refused(device, "no such expert", outside);
    let mut none = place_counts(device, 0, 4, &[]);
    assert_refused("no sequences", Balance::<A>::count_choices(device, none.view_mut(), experts.view()));
    let mut narrow = place_counts(device, 1, 2, &[0; 2]);
    assert_refused("sums", Balance::<A>::sum_counts(device, narrow.view_mut(), counts.view()));
    let (mut sum, other) = (output::<f64, D>(device, 1, 1), place_ints(device, 1, 1, &[0]));
    let dropped = Balance::<A>::count_dropped(device, sum.view_mut(), experts.view(), other.view());
    assert_refused("other choices", dropped);

    let probs = place::<A, D>(device, &Matrix::row(&[0.5; 3]));
    let short = place_counts(device, 1, 3, &[1; 3]);
    let term = BalanceTerm { counts: narrow.view(), factor: 1.0, per_token: true };
    assert_refused("counts", device.balance_dot(sum.view_mut(), probs.view(), counts.view(), term));
    let mut gradient = output::<A, D>(device, 1, 3);
    let terms = |unit, step| BalanceTerms { unit, micro_batch: 1.0, sequence: 1.0, step, model: None };
    assert_refused("unit", device.balance_gradient(gradient.view_mut(), terms(short.view(), None)));
    assert_refused("step", device.balance_gradient(gradient.view_mut(), terms(counts.view(), Some(term))));
    let input = |own| BalanceInput { own, unit: counts.view(), chosen: None, probs: probs.view(), top_k: 1 };
    let mut sums = output::<f64, D>(device, 1, 11);
    assert_refused("own", device.balance_sums(sums.view_mut(), input(short.view())));
    assert_refused("sums", device.balance_sums(sum.view_mut(), input(counts.view())));
}
