//! Router scores, choice and sorting.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks, take};
use super::parallel::rows_per_piece;
use super::simd::simd;
use super::{Cpu, choices};
use crate::check;
use crate::family::{
    DropLimit, ExpertGroups, RouteInput, RouteOutput, Routing, ScoreFunction, Scoring, SortOutput,
};
use crate::random::uniform_pair;
use crate::{Error, Result, View, ViewMut};

/// Added to sums of sigmoids before they divide, as DeepSeek-V3 does.
const EPSILON: f64 = 1e-20;

/// From logits to scores.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Score {
    Softmax,
    Sigmoid,
    SqrtSoftplus,
}

/// A score function, as the loops tell them apart. A softmax over the chosen is the softmax over all, divided by the
/// sum over the chosen: `SoftmaxPost` and a normalised `SoftmaxPre` have the same weights.
#[derive(Debug, Clone, Copy)]
struct Function {
    score: Score,
    /// Whether weights are divided by their sum.
    normalize: bool,
    /// Whether groups are judged by their logits.
    by_logits: bool,
}

impl From<ScoreFunction> for Function {
    fn from(function: ScoreFunction) -> Self {
        let (score, normalize, by_logits) = match function {
            ScoreFunction::SoftmaxPost => (Score::Softmax, true, true),
            ScoreFunction::SoftmaxPre { normalize } => (Score::Softmax, normalize, false),
            ScoreFunction::Sigmoid { normalize } => (Score::Sigmoid, normalize, false),
            ScoreFunction::SqrtSoftplus { normalize } => (Score::SqrtSoftplus, normalize, false),
        };
        Function { score, normalize, by_logits }
    }
}

impl Function {
    /// Whether a score is made of one logit alone.
    fn is_separate(self) -> bool {
        self.score != Score::Softmax
    }

    /// Whether weights are a softmax over the chosen.
    fn is_over_chosen(self) -> bool {
        self.score == Score::Softmax && self.normalize
    }
}

/// Of `candidates` (ascending), those of the largest scores in descending order, ties to the smaller one.
#[inline(always)]
fn choose(chosen: &mut [i32], scores: &[impl CpuFloat], candidates: impl Iterator<Item = usize>) {
    let mut count = 0;
    for e in candidates {
        let x = scores[e];
        let at = chosen[..count].iter().position(|&c| scores[c as usize] < x).unwrap_or(count);
        if at < chosen.len() {
            count = (count + 1).min(chosen.len());
            chosen[at..count].rotate_right(1);
            chosen[at] = e as i32;
        }
    }
}

/// By how much `chosen` are ahead of the other `candidates`; infinite without others.
fn margin<T: CpuFloat>(chosen: &[i32], scores: &[T], candidates: impl Iterator<Item = usize>) -> T {
    let infinity = -T::NEG_INFINITY;
    let worst = chosen.iter().fold(infinity, |worst, &c| least(worst, scores[c as usize]));
    let others = candidates.filter(|&e| !chosen.contains(&(e as i32)));
    // Equal scores may be infinite.
    let margins = others.map(|e| if scores[e] == worst { T::ZERO } else { worst - scores[e] });
    margins.fold(infinity, least)
}

fn least<T: CpuFloat>(a: T, b: T) -> T {
    if b < a { b } else { a }
}

/// Scratch of a group-limited choice.
struct GroupChoice<T> {
    groups: ExpertGroups,
    /// Selection score of each group.
    scores: Vec<T>,
    /// The best experts of one group.
    best: Vec<i32>,
    kept: Vec<i32>,
}

impl<T: CpuFloat> GroupChoice<T> {
    fn new(groups: ExpertGroups) -> Self {
        let ExpertGroups { count, kept, score_top_k } = groups;
        GroupChoice { groups, scores: vec![T::ZERO; count], best: vec![0; score_top_k], kept: vec![0; kept] }
    }

    /// [`choose`] by `order` among the experts of the groups that are best by `scores`.
    #[inline(always)]
    fn choose(&mut self, chosen: &mut [i32], order: &[T], scores: &[T]) {
        let size = scores.len() / self.groups.count;
        for (g, score) in self.scores.iter_mut().enumerate() {
            choose(&mut self.best, scores, g * size..(g + 1) * size);
            *score = T::ZERO;
            for &e in &self.best {
                *score += scores[e as usize];
            }
        }
        choose(&mut self.kept, &self.scores, 0..self.groups.count);
        self.kept.sort_unstable();
        choose(chosen, order, self.candidates(size));
    }

    /// The experts of the kept groups, of `size` each.
    #[inline(always)]
    fn candidates(&self, size: usize) -> impl Iterator<Item = usize> {
        self.kept.iter().flat_map(move |&g| g as usize * size..(g as usize + 1) * size)
    }

    /// By how much the last choice, `chosen` by `order`, stands.
    fn margin(&self, chosen: &[i32], order: &[T]) -> T {
        let of_groups = margin(&self.kept, &self.scores, 0..self.groups.count);
        least(of_groups, margin(chosen, order, self.candidates(order.len() / self.groups.count)))
    }
}

/// `s = 1 / (1 + e^−x)` and `1 − s`, neither of them by cancellation.
#[inline(always)]
fn sigmoid<T: CpuFloat>(x: T) -> (T, T) {
    let e = (if x < T::ZERO { x } else { -x }).exp();
    let (near, far) = (T::ONE / (T::ONE + e), e / (T::ONE + e));
    if x < T::ZERO { (far, near) } else { (near, far) }
}

/// `s = sqrt(ln(1 + e^x))` and its derivative `sigmoid(x) / 2s`.
#[inline(always)]
fn sqrt_softplus<T: CpuFloat>(x: T) -> (T, T) {
    let two = T::ONE + T::ONE;
    // Where e^x is lost beside 1, ln(1 + e^x) is e^x, and its root is no subnormal number yet.
    if x < T::from_f64(-40.0) {
        let s = (x / two).exp();
        return (s, s / two);
    }
    let e = (if x < T::ZERO { x } else { -x }).exp();
    let s = ((if x < T::ZERO { T::ZERO } else { x }) + e.ln_1p()).sqrt();
    (s, sigmoid(x).0 / (two * s))
}

/// A score that is made of one logit alone, and its derivative.
#[inline(always)]
fn separate<T: CpuFloat>(score: Score, x: T) -> (T, T) {
    match score {
        Score::SqrtSoftplus => sqrt_softplus(x),
        Score::Softmax | Score::Sigmoid => {
            let (s, rest) = sigmoid(x);
            (s, s * rest)
        }
    }
}

/// The softmax of `logits`; returns their log-sum-exp, and the sum that divides.
#[inline(always)]
fn softmax<T: CpuFloat>(probs: &mut [T], logits: &[T]) -> [T; 2] {
    let max = logits.iter().fold(T::NEG_INFINITY, |max, &x| if max < x { x } else { max });
    let mut sum = T::ZERO;
    for (p, &x) in probs.iter_mut().zip(logits) {
        *p = (x - max).exp();
        sum += *p;
    }
    for p in probs {
        *p = *p / sum;
    }
    [max + sum.ln(), sum]
}

/// The chosen's shares of a softmax over them, but for a factor; false where all their logits are −∞.
///
/// The largest of their own logits is taken off, since those given may lie so far below the row's that no probability is
/// left of them. With the row's `sum` as the factor, they are its probabilities where its largest logit is chosen.
#[inline(always)]
fn shares<T: CpuFloat>(out: &mut [T], logits: &[T], chosen: &[i32], sum: T) -> bool {
    let max = chosen
        .iter()
        .map(|&e| logits[e as usize])
        .fold(T::NEG_INFINITY, |max, x| if max < x { x } else { max });
    for (s, &e) in out.iter_mut().zip(chosen) {
        *s = (logits[e as usize] - max).exp() / sum;
    }
    max.is_finite()
}

/// What [`Routing::route`] writes, for some of the tokens.
struct Routes<'a, T> {
    weights: MatMut<'a, T>,
    experts: MatMut<'a, i32>,
    unbiased: Option<MatMut<'a, i32>>,
    probs: MatMut<'a, T>,
    lse: &'a mut [T],
    margins: Option<&'a mut [T]>,
}

simd! {
    /// Returns the first token whose logits, or those that weights are made of, have no softmax.
    fn route<T>(
        out: Routes<'_, T>,
        tokens: Tokens<'_, T>,
        bias: Option<&[T]>,
        function: Function,
        groups: Option<ExpertGroups>,
        scale: T,
    ) -> Option<usize> {
        let Tokens { logits, given, valid } = tokens;
        let (count, is_separate) = (logits.cols(), function.is_separate());
        let mut groups = groups.map(GroupChoice::new);
        let (mut scores, mut biased) = (vec![T::ZERO; count], vec![T::ZERO; count]);
        for (i, logits) in logits.iter().enumerate() {
            let probs = out.probs.row(i);
            if valid.is_some_and(|valid| valid[i] == 0) {
                probs.fill(T::ZERO);
                out.lse[i] = T::ZERO;
                out.weights.row(i).fill(T::ZERO);
                out.experts.row(i).fill(-1);
                if let Some(unbiased) = &mut out.unbiased {
                    unbiased.row(i).fill(-1);
                }
                if let Some(margins) = &mut out.margins {
                    margins[i] = -T::NEG_INFINITY;
                }
                continue;
            }
            let [lse, exponentials] = softmax(probs, logits);
            out.lse[i] = lse;
            if !lse.is_finite() {
                return Some(i);
            }
            if is_separate {
                let mut sum = T::from_f64(EPSILON);
                for (s, &x) in scores.iter_mut().zip(logits) {
                    *s = separate(function.score, x).0;
                    sum += *s;
                }
                for (p, &s) in probs.iter_mut().zip(&scores) {
                    *p = s / sum;
                }
            }
            // Softmax keeps the order of the logits, which rounding does not blur.
            let plain: &[T] = if is_separate { &scores } else { logits };
            if let Some(bias) = bias {
                for ((b, &s), &by) in biased.iter_mut().zip(plain).zip(bias) {
                    *b = s + by;
                }
            }
            let order: &[T] = if bias.is_some() { &biased } else { plain };
            let (weights, chosen) = (out.weights.row(i), out.experts.row(i));
            match (&given, &mut groups) {
                (Some(given), _) => chosen.copy_from_slice(given.row(i)),
                (None, None) => choose(chosen, order, 0..count),
                (None, Some(groups)) => {
                    let by_probs = !is_separate && !function.by_logits;
                    groups.choose(chosen, order, if by_probs { probs } else { order });
                }
            }
            if let Some(unbiased) = &mut out.unbiased {
                choose(unbiased.row(i), plain, 0..count);
            }
            if let Some(margins) = &mut out.margins {
                let own = match (&given, &groups) {
                    (Some(_), _) => -T::NEG_INFINITY,
                    (None, None) => margin(chosen, order, 0..count),
                    (None, Some(groups)) => groups.margin(chosen, order),
                };
                let unbiased = out.unbiased.as_mut().map(|unbiased| margin(unbiased.row(i), plain, 0..count));
                margins[i] = unbiased.map_or(own, |unbiased| least(own, unbiased));
            }
            let scores: &[T] = if is_separate { &scores } else { probs };
            if function.is_over_chosen() {
                if !shares(weights, logits, chosen, exponentials) {
                    return Some(i);
                }
            } else {
                weights.iter_mut().zip(&*chosen).for_each(|(w, &e)| *w = scores[e as usize]);
            }
            let mut total = if is_separate { T::from_f64(EPSILON) } else { T::ZERO };
            for w in &*weights {
                total += *w;
            }
            for w in weights {
                *w = if function.normalize { *w / total * scale } else { *w * scale };
            }
        }
        None
    }
}

/// What [`Routing::route`] reads, for some of the tokens.
struct Tokens<'a, T> {
    logits: Mat<'a, T>,
    given: Option<Mat<'a, i32>>,
    valid: Option<&'a [i32]>,
}

simd! {
    /// Adds the softmaxes of `logits + bias` to `sums`; returns the first token that has none.
    fn softmax_sums<T>(
        sums: &mut [f64],
        logits: Mat<'_, T>,
        bias: &[T],
        valid: Option<&[i32]>,
    ) -> Option<usize> {
        let (mut biased, mut probs) = (vec![T::ZERO; bias.len()], vec![T::ZERO; bias.len()]);
        for (i, logits) in logits.iter().enumerate() {
            if valid.is_some_and(|valid| valid[i] == 0) {
                continue;
            }
            for ((b, &x), &by) in biased.iter_mut().zip(logits).zip(bias) {
                *b = x + by;
            }
            if !softmax(&mut probs, &biased)[0].is_finite() {
                return Some(i);
            }
            for (sum, &p) in sums.iter_mut().zip(&probs) {
                *sum += p.to_f64();
            }
        }
        None
    }
}

/// What [`Routing::route_backward`] reads, for some of the tokens.
struct Routed<'a, T> {
    /// Index of the first token.
    first: usize,
    dweights: Mat<'a, T>,
    experts: Mat<'a, i32>,
    logits: Mat<'a, T>,
}

simd! {
    /// A softmax `p`, over all or the chosen, under the gradient `d` has `p ⊙ (d − Σ p ⊙ d)`, and `d lse / d logits = p`. A
    /// separate score `s` under `d` has `d·s'`; its share `s / Σ s` under `d` has `(d − Σ share ⊙ d) / Σ s`.
    fn backward<T>(
        dlogits: MatMut<'_, T>,
        routed: Routed<'_, T>,
        function: Function,
        scale: T,
        aux: Mat<'_, T>,
        two_z: T,
    ) {
        let (count, is_separate) = (routed.logits.cols(), function.is_separate());
        let (mut probs, mut scores, mut slopes) =
            (vec![T::ZERO; count], vec![T::ZERO; count], vec![T::ZERO; count]);
        let mut chosen = vec![T::ZERO; routed.experts.cols()];
        for (i, logits) in routed.logits.iter().enumerate() {
            let (dlogits, aux) = (dlogits.row(i), aux.row((routed.first + i) % aux.rows()));
            let (dweights, experts) = (routed.dweights.row(i), routed.experts.row(i));
            if experts.iter().all(|&e| e < 0) {
                dlogits.fill(T::ZERO);
                continue;
            }
            let [lse, exponentials] = softmax(&mut probs, logits);
            let epsilon = if is_separate { T::from_f64(EPSILON) } else { T::ZERO };
            let mut sum = epsilon;
            if is_separate {
                for ((s, slope), &x) in scores.iter_mut().zip(&mut slopes).zip(logits) {
                    (*s, *slope) = separate(function.score, x);
                    sum += *s;
                }
            }

            // The chosen: their sum, and the mean of the gradient over them.
            let own: &[T] = if is_separate { &scores } else { &probs };
            if function.is_over_chosen() {
                shares(&mut chosen, logits, experts, exponentials);
            } else {
                chosen.iter_mut().zip(experts).for_each(|(s, &e)| *s = own[e as usize]);
            }
            let mut total = epsilon;
            let mut mean_chosen = T::ZERO;
            for (&s, &d) in chosen.iter().zip(dweights) {
                total += s;
                mean_chosen += s * d;
            }
            if function.normalize {
                mean_chosen = mean_chosen / total;
            }
            mean_chosen *= scale;

            let mut mean = T::ZERO;
            for (&s, &a) in own.iter().zip(aux) {
                mean += s * a;
            }
            if is_separate {
                mean = mean / sum;
                for ((d, &slope), &a) in dlogits.iter_mut().zip(&slopes).zip(aux) {
                    *d = slope * (a - mean) / sum;
                }
                for (d, &p) in dlogits.iter_mut().zip(&probs) {
                    *d += p * two_z * lse;
                }
                for (&e, &d) in experts.iter().zip(dweights) {
                    let slope = slopes[e as usize];
                    let d = d * scale;
                    dlogits[e as usize] +=
                        if function.normalize { slope * (d - mean_chosen) / total } else { slope * d };
                }
            } else {
                if !function.normalize {
                    mean += mean_chosen;
                }
                for ((d, &p), &a) in dlogits.iter_mut().zip(&probs).zip(aux) {
                    *d = p * (a - mean + two_z * lse);
                }
                for ((&e, &d), &s) in experts.iter().zip(dweights).zip(&chosen) {
                    let d = d * scale;
                    dlogits[e as usize] += if function.normalize { s / total * (d - mean_chosen) } else { s * d };
                }
            }
        }
    }
}

/// Refuses a choice of other than `count` experts.
fn check_choice<'a>(
    kernel: &'static str,
    experts: impl Iterator<Item = &'a [i32]> + Clone,
    count: usize,
) -> Result<()> {
    let chosen = experts.flatten();
    check::argument(kernel, chosen.clone().all(|&e| e >= 0), || "a chosen expert is negative".to_owned())?;
    check::indices(kernel, "expert", chosen, count)
}

impl<T: CpuFloat> Routing<T> for Cpu {
    fn route(
        &self,
        out: RouteOutput<'_, T, Self>,
        input: RouteInput<'_, T, Self>,
        scoring: &Scoring,
    ) -> Result<()> {
        const KERNEL: &str = "route";
        check::route(KERNEL, &out, &input, scoring)?;
        let RouteInput { logits, bias, given, valid } = input;
        let RouteOutput { mut weights, mut experts, mut unbiased, mut probs, mut lse, mut margins } = out;
        let [n, count] = logits.shape();
        let function = Function::from(scoring.function);
        let valid = valid.map(|valid| Mat::from(valid).vector());
        let given = given.map(Mat::from);
        if let Some(given) = &given {
            // What is given to padding is not used.
            let used = given.iter().enumerate().filter(|(i, _)| valid.is_none_or(|valid| valid[*i] != 0));
            check_choice(KERNEL, used.map(|(_, experts)| experts), count)?;
        }
        let (logits, bias) = (Mat::from(logits), bias.map(|bias| Mat::from(bias).vector()));
        let (mut weights, mut experts) = (MatMut::from(&mut weights), MatMut::from(&mut experts));
        let mut unbiased = unbiased.as_mut().map(MatMut::from);
        let (mut probs, mut lse) = (MatMut::from(&mut probs), MatMut::from(&mut lse).vector());
        let mut margins = margins.as_mut().map(|margins| MatMut::from(margins).vector());
        let tasks = blocks(n, rows_per_piece(8 * count))
            .map(|r| {
                let out = Routes {
                    weights: weights.take_rows(r.len()),
                    experts: experts.take_rows(r.len()),
                    unbiased: unbiased.as_mut().map(|unbiased| unbiased.take_rows(r.len())),
                    probs: probs.take_rows(r.len()),
                    lse: take(&mut lse, r.len()),
                    margins: margins.as_mut().map(|margins| take(margins, r.len())),
                };
                (r, out)
            })
            .collect();
        let failed = AtomicUsize::new(usize::MAX);
        let scale = T::from_f64(scoring.scale);
        self.for_each(tasks, |(r, out)| {
            let given = given.map(|given| given.row_range(r.clone()));
            let valid = valid.map(|valid| &valid[r.clone()]);
            let tokens = Tokens { logits: logits.row_range(r.clone()), given, valid };
            if let Some(i) = route(out, tokens, bias, function, scoring.groups, scale) {
                failed.fetch_min(r.start + i, Ordering::Relaxed);
            }
        })?;
        match failed.into_inner() {
            usize::MAX => Ok(()),
            row => Err(Error::NotANumber { kernel: KERNEL, row }),
        }
    }

    fn softmax_sums(
        &self,
        mut sums: ViewMut<'_, f64, Self>,
        logits: View<'_, T, Self>,
        bias: View<'_, T, Self>,
        valid: Option<View<'_, i32, Self>>,
    ) -> Result<()> {
        const KERNEL: &str = "softmax_sums";
        let [n, count] = check::softmax_sums(KERNEL, &sums, logits, bias, valid)?;
        let valid = valid.map(|valid| Mat::from(valid).vector());
        let (logits, bias) = (Mat::from(logits), Mat::from(bias).vector());
        let pieces: Vec<_> = blocks(n, rows_per_piece(8 * count)).collect();
        let mut parts = vec![0.0; pieces.len() * count];
        let tasks = pieces.into_iter().zip(parts.chunks_mut(count.max(1))).collect();
        let failed = AtomicUsize::new(usize::MAX);
        self.for_each(tasks, |(r, part)| {
            let valid = valid.map(|valid| &valid[r.clone()]);
            if let Some(i) = softmax_sums(part, logits.row_range(r.clone()), bias, valid) {
                failed.fetch_min(r.start + i, Ordering::Relaxed);
            }
        })?;
        let sums = MatMut::from(&mut sums).vector();
        sums.fill(0.0);
        for part in parts.chunks(count.max(1)) {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        match failed.into_inner() {
            usize::MAX => Ok(()),
            row => Err(Error::NotANumber { kernel: KERNEL, row }),
        }
    }

    fn jitter(
        &self,
        mut x: ViewMut<'_, T, Self>,
        tokens: View<'_, i64, Self>,
        key: u64,
        epsilon: f64,
    ) -> Result<()> {
        check::jitter("jitter", &x, tokens, epsilon)?;
        let [n, width] = x.shape();
        let tokens = Mat::from(tokens).vector();
        let mut x = MatMut::from(&mut x);
        let tasks =
            blocks(n, rows_per_piece(16 * width)).map(|r| (x.take_rows(r.len()), &tokens[r])).collect();
        self.for_each(tasks, |(mut x, tokens)| {
            for (i, &token) in tokens.iter().enumerate() {
                for (pair, x) in x.row(i).chunks_mut(2).enumerate() {
                    let uniform = uniform_pair(key, token as u64, pair as u64);
                    for (x, u) in x.iter_mut().zip(uniform) {
                        *x *= T::from_f64(1.0 + epsilon * (2.0 * u - 1.0));
                    }
                }
            }
        })
    }

    fn route_backward(
        &self,
        mut dlogits: ViewMut<'_, T, Self>,
        dweights: View<'_, T, Self>,
        experts: View<'_, i32, Self>,
        logits: View<'_, T, Self>,
        scoring: &Scoring,
        aux: View<'_, T, Self>,
        z: f64,
    ) -> Result<()> {
        const KERNEL: &str = "route_backward";
        check::route_backward(KERNEL, &dlogits, dweights, experts, logits, aux)?;
        let [n, count] = dlogits.shape();
        let (dweights, experts) = (Mat::from(dweights), Mat::from(experts));
        let (logits, aux) = (Mat::from(logits), Mat::from(aux));
        let padding = |row: &&[i32]| row.iter().all(|&e| e < 0);
        check_choice(KERNEL, experts.iter().filter(|row| !padding(row)), count)?;
        let mut dlogits = MatMut::from(&mut dlogits);
        let tasks = blocks(n, rows_per_piece(8 * count))
            .map(|r| {
                let routed = Routed {
                    first: r.start,
                    dweights: dweights.row_range(r.clone()),
                    experts: experts.row_range(r.clone()),
                    logits: logits.row_range(r.clone()),
                };
                (dlogits.take_rows(r.len()), routed)
            })
            .collect();
        let (function, scale) = (Function::from(scoring.function), T::from_f64(scoring.scale));
        self.for_each(tasks, |(dlogits, routed)| {
            backward(dlogits, routed, function, scale, aux, T::from_f64(2.0 * z));
        })
    }

    fn drop_excess(
        &self,
        kept: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
        weights: Option<View<'_, T, Self>>,
        slots: View<'_, i32, Self>,
        limit: DropLimit,
    ) -> Result<()> {
        choices::drop_excess(kept, experts, weights, slots, limit)
    }

    fn sort_by_expert(
        &self,
        out: SortOutput<'_, Self>,
        experts: View<'_, i32, Self>,
        rows_per_expert: Option<usize>,
    ) -> Result<()> {
        choices::sort_by_expert(out, experts, rows_per_expert)
    }
}
