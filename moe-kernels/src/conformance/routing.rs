//! Router scores, choice and sorting.

use super::host::{
    Matrix, Placed, Random, assert_close, assert_data_refused, assert_refused, gradient, output, output_ints,
    place, place_elements, place_ints, settled,
};
use super::{GRADIENT, choices};
use crate::family::{ExpertGroups, RouteInput, RouteOutput, Routing, ScoreFunction, Scoring};
use crate::random::uniform_pair;
use crate::{Device, Error, Float, Result};

/// Tokens, experts, choices.
const SIZES: [(usize, usize, usize); 7] =
    [(0, 4, 2), (1, 1, 1), (7, 6, 2), (9, 8, 8), (6, 17, 3), (400, 60, 4), (5, 12, 4)];

/// Every score function, plain, scaled, and under every grouping that `count` experts allow.
fn scorings(count: usize, k: usize) -> Vec<Scoring> {
    let functions = [
        ScoreFunction::SoftmaxPost,
        ScoreFunction::SoftmaxPre { normalize: false },
        ScoreFunction::SoftmaxPre { normalize: true },
        ScoreFunction::Sigmoid { normalize: false },
        ScoreFunction::Sigmoid { normalize: true },
        ScoreFunction::SqrtSoftplus { normalize: false },
        ScoreFunction::SqrtSoftplus { normalize: true },
    ];
    let groups = [(2, 1, 1), (3, 2, 2), (4, 2, 1), (4, 3, 2), (12, 5, 1)]
        .map(|(count, kept, score_top_k)| ExpertGroups { count, kept, score_top_k })
        .into_iter()
        .filter(|g| {
            let size = count / g.count;
            count.is_multiple_of(g.count) && k <= g.kept * size && g.score_top_k <= size
        })
        .map(Some);
    let groups: Vec<_> = [None].into_iter().chain(groups).collect();
    let scorings = functions.into_iter().flat_map(|function| {
        groups.iter().map(move |&groups| {
            let scale = if groups.is_some() { 2.5 } else { 1.0 };
            Scoring { function, groups, scale }
        })
    });
    scorings.collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// What a logit is worth before it is divided by anything.
fn score(function: ScoreFunction, x: f64) -> f64 {
    match function {
        ScoreFunction::SoftmaxPost | ScoreFunction::SoftmaxPre { .. } => x.exp(),
        ScoreFunction::Sigmoid { .. } => sigmoid(x),
        ScoreFunction::SqrtSoftplus { .. } => x.exp().ln_1p().sqrt(),
    }
}

fn lse(logits: &Matrix, i: usize) -> f64 {
    (0..logits.cols).map(|e| logits.at(i, e).exp()).sum::<f64>().ln()
}

fn probs(logits: &Matrix, scoring: &Scoring) -> Matrix {
    let score = |x| score(scoring.function, x);
    let sum_of_row = |i| (0..logits.cols).map(|e| score(logits.at(i, e))).sum::<f64>();
    let sums: Vec<f64> = (0..logits.rows).map(sum_of_row).collect();
    Matrix::from_fn(logits.rows, logits.cols, |i, e| score(logits.at(i, e)) / sums[i])
}

/// The weights of fixed choices.
fn weights(logits: &Matrix, experts: &[i32], k: usize, scoring: &Scoring) -> Matrix {
    Matrix::from_fn(logits.rows, k, |i, slot| {
        let score = |&e: &i32| score(scoring.function, logits.at(i, e as usize));
        let chosen = &experts[i * k..(i + 1) * k];
        let over: f64 = match scoring.function {
            ScoreFunction::SoftmaxPre { normalize: false } => lse(logits, i).exp(),
            ScoreFunction::Sigmoid { normalize: false }
            | ScoreFunction::SqrtSoftplus { normalize: false } => 1.0,
            _ => chosen.iter().map(score).sum(),
        };
        scoring.scale * score(&chosen[slot]) / over
    })
}

/// The positions of the `k` largest, ties to the smaller position.
fn top(scores: &[f64], k: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    ids.truncate(k);
    ids
}

/// By how much the `k` largest are ahead of the rest, sorted: the last of them of the first that is not.
fn gap(scores: &[f64], k: usize) -> f64 {
    let mut scores = scores.to_vec();
    scores.sort_by(|a, b| b.total_cmp(a));
    scores.get(k).map_or(f64::INFINITY, |next| scores[k - 1] - next)
}

/// The choice by the definition, and by how much each token's stands.
fn choices_of(logits: &Matrix, k: usize, bias: Option<&Matrix>, scoring: &Scoring) -> (Vec<i32>, Vec<f64>) {
    let probs = probs(logits, scoring);
    let choice = (0..logits.rows).map(|i| {
        let score = |e: usize| match scoring.function.is_separate() {
            true => score(scoring.function, logits.at(i, e)) + bias.map_or(0.0, |bias| bias.at(0, e)),
            false => logits.at(i, e) + bias.map_or(0.0, |bias| bias.at(0, e)),
        };
        let mut scores: Vec<f64> = (0..logits.cols).map(score).collect();
        let (mut candidates, mut margin) = (scores.clone(), f64::INFINITY);
        if let Some(groups) = scoring.groups {
            let size = logits.cols / groups.count;
            let by_probs = matches!(scoring.function, ScoreFunction::SoftmaxPre { .. });
            let own: Vec<f64> =
                (0..logits.cols).map(|e| if by_probs { probs.at(i, e) } else { scores[e] }).collect();
            let of_group = |g: &[f64]| top(g, groups.score_top_k).into_iter().map(|e| g[e]).sum();
            let of_groups: Vec<f64> = own.chunks(size).map(of_group).collect();
            let kept = top(&of_groups, groups.kept);
            margin = gap(&of_groups, groups.kept);
            candidates = kept.iter().flat_map(|g| scores[g * size..(g + 1) * size].to_vec()).collect();
            let lost = scores.iter_mut().enumerate().filter(|(e, _)| !kept.contains(&(e / size)));
            lost.for_each(|(_, score)| *score = f64::NEG_INFINITY);
        }
        (top(&scores, k), margin.min(gap(&candidates, k)))
    });
    let (experts, margins): (Vec<_>, _) = choice.unzip();
    (experts.into_iter().flatten().map(|e| e as i32).collect(), margins)
}

fn chosen(logits: &Matrix, k: usize, bias: Option<&Matrix>, scoring: &Scoring) -> Vec<i32> {
    choices_of(logits, k, bias, scoring).0
}

/// The margins of a choice and of the plain one beside it.
fn margins(logits: &Matrix, k: usize, bias: Option<&Matrix>, scoring: &Scoring) -> Matrix {
    let own = choices_of(logits, k, bias, scoring).1;
    let plain = choices_of(logits, k, None, &Scoring { groups: None, ..*scoring }).1;
    Matrix::row(&own.iter().zip(plain).map(|(own, plain)| own.min(plain)).collect::<Vec<_>>())
}

/// [`Routing`]: scores, ties, groups, biases, gradients with auxiliary and z-loss, not-a-number, jitter, dropping, the stable sort.
pub fn routing<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    choice::<A, D>(device, tolerance);
    extreme_scores::<A, D>(device, tolerance);
    given_choices::<A, D>(device, tolerance);
    unlikely_choices::<A, D>(device, tolerance);
    margins_alone::<A, D>(device);
    softmax_sums::<A, D>(device, tolerance);
    jitter::<A, D>(device, tolerance);
    padding::<A, D>(device);
    refusals::<A, D>(device);
    not_a_number::<A, D>(device);
    choices::dropping::<A, D>(device);
    choices::sorting::<A, D>(device);
}

/// What `route` wrote.
struct Routed<A: Float, D: Device> {
    weights: Placed<A, D>,
    experts: Placed<i32, D>,
    unbiased: Placed<i32, D>,
    probs: Placed<A, D>,
    lse: Placed<A, D>,
    margins: Placed<A, D>,
}

fn route<A: Float<Acc = A>, D: Routing<A>>(
    device: &D,
    logits: &Matrix,
    k: usize,
    bias: Option<&Matrix>,
    scoring: &Scoring,
) -> (Result<()>, Routed<A, D>) {
    route_given::<A, D>(device, logits, k, bias, None, scoring)
}

fn route_given<A: Float<Acc = A>, D: Routing<A>>(
    device: &D,
    logits: &Matrix,
    k: usize,
    bias: Option<&Matrix>,
    given: Option<&[i32]>,
    scoring: &Scoring,
) -> (Result<()>, Routed<A, D>) {
    let [n, count] = [logits.rows, logits.cols];
    let mut out = Routed {
        weights: output(device, n, k),
        experts: output_ints(device, n, k),
        unbiased: output_ints(device, n, k),
        probs: output(device, n, count),
        lse: output(device, 1, n),
        margins: output(device, 1, n),
    };
    let (logits, bias) = (place::<A, D>(device, logits), bias.map(|bias| place::<A, D>(device, bias)));
    let views = RouteOutput {
        weights: out.weights.view_mut(),
        experts: out.experts.view_mut(),
        unbiased: Some(out.unbiased.view_mut()),
        probs: out.probs.view_mut(),
        lse: out.lse.view_mut(),
        margins: Some(out.margins.view_mut()),
    };
    let given = given.map(|given| place_ints(device, given.len() / k, k, given));
    let input = RouteInput {
        logits: logits.view(),
        bias: bias.as_ref().map(Placed::view),
        given: given.as_ref().map(Placed::view),
        valid: None,
    };
    (device.route(views, input, scoring), out)
}

/// Logits that are far apart in the router's type, but for the ties.
fn distinct_logits<A: Float>(random: &mut Random, n: usize, count: usize) -> Matrix {
    let mut logits = random.matrix::<A>(n, count);
    for i in 0..n {
        // A permutation of steps of 1/16 around 0, each with a smaller random part.
        let mut places: Vec<usize> = (0..count).collect();
        for e in (1..count).rev() {
            places.swap(e, random.below(e + 1));
        }
        for (e, place) in places.into_iter().enumerate() {
            let x = &mut logits.data[i * count + e];
            *x = A::from_f64((place as f64 - count as f64 / 2.0) / 16.0 + *x / 64.0).to_f64();
        }
    }
    if n > 2 {
        // Ties: all equal, then some.
        logits.data[..count].fill(0.5);
        for e in (0..count).step_by(2) {
            logits.data[count + e] = 3.0;
        }
    }
    logits
}

fn choice<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(13);
    for (n, count, k) in SIZES {
        let logits = distinct_logits::<A>(&mut random, n, count);
        // Multiples of 1/8, so that they turn the order around.
        let bias = Matrix::from_fn(1, count, |_, e| ((5 * e + 3) % 7) as f64 / 8.0 - 0.25);
        for scoring in scorings(count, k) {
            let takes_bias = scoring.function.is_separate() || scoring.groups.is_none();
            let biases: &[Option<&Matrix>] = if takes_bias { &[None, Some(&bias)] } else { &[None] };
            for &bias in biases {
                let what = format!("{n} tokens, {k} of {count}, {scoring:?}, bias {}", bias.is_some());
                let (routed, out) = route::<A, D>(device, &logits, k, bias, &scoring);
                routed.expect("route");
                let experts = chosen(&logits, k, bias, &scoring);
                assert_eq!(out.experts.elements(), experts, "experts, {what}");
                let plain = chosen(&logits, k, None, &Scoring { groups: None, ..scoring });
                assert_eq!(out.unbiased.elements(), plain, "unbiased, {what}");
                assert_close(
                    &format!("probs, {what}"),
                    &out.probs.read(),
                    &probs(&logits, &scoring),
                    tolerance,
                );
                let want = Matrix::from_fn(1, n, |_, i| lse(&logits, i));
                assert_close(&format!("lse, {what}"), &out.lse.read(), &want, tolerance);
                let want = weights(&logits, &experts, k, &scoring);
                assert_close(&format!("weights, {what}"), &out.weights.read(), &want, tolerance);
                let want = margins(&logits, k, bias, &scoring);
                // Differences of scores that may be larger.
                assert_close(&format!("margins, {what}"), &out.margins.read(), &want, tolerance * 64.0);
                if n * count <= 200 {
                    gradients::<A, D>(device, &mut random, &logits, &experts, k, &scoring, tolerance, &what);
                }
            }
        }
    }
}

#[allow(clippy::too_many_arguments)] // one case of the list above
fn gradients<A: Float<Acc = A>, D: Routing<A>>(
    device: &D,
    random: &mut Random,
    logits: &Matrix,
    experts: &[i32],
    k: usize,
    scoring: &Scoring,
    tolerance: f64,
    what: &str,
) {
    let [n, count] = [logits.rows, logits.cols];
    let dw = random.matrix::<A>(n, k);
    let no_loss = Matrix::from_fn(1, count, |_, _| 0.0);
    let losses = [(no_loss, 0.0), (random.matrix::<A>(1, count), 0.3), (random.matrix::<A>(3, count), 0.3)];
    for (aux, z) in losses {
        let want = gradient(logits, |logits| {
            let all = Matrix::from_fn(n, count, |i, e| aux.at(i % aux.rows, e));
            let z_loss: f64 = (0..n).map(|i| z * lse(logits, i).powi(2)).sum();
            weights(logits, experts, k, scoring).dot(&dw) + probs(logits, scoring).dot(&all) + z_loss
        });
        let (pl, pdw, pa) =
            (place::<A, D>(device, logits), place::<A, D>(device, &dw), place::<A, D>(device, &aux));
        let mut dl = output::<A, D>(device, n, count);
        let run = |dl: &mut Placed<A, D>, dw: &Placed<A, D>, aux: &Placed<A, D>, e: &[i32]| {
            let e = place_ints(device, n, k, e);
            device.route_backward(dl.view_mut(), dw.view(), e.view(), pl.view(), scoring, aux.view(), z)
        };
        run(&mut dl, &pdw, &pa, experts).expect("route_backward");
        assert_close(&format!("dlogits, {what}"), &dl.read(), &want, tolerance.max(GRADIENT) * 4.0);
        let wrong = place::<A, D>(device, &random.matrix::<A>(n, k + 1));
        assert_refused("dweights", run(&mut dl, &wrong, &pa, experts));
        let none = place::<A, D>(device, &random.matrix::<A>(0, count));
        assert_refused("aux", run(&mut dl, &pdw, &none, experts));
        if n > 0 {
            assert_data_refused(
                device,
                "no such expert",
                run(&mut dl, &pdw, &pa, &vec![count as i32; n * k]),
            );
        }
        if n > 0 && k > 1 {
            let mut mixed = experts.to_vec();
            mixed[0] = -1;
            assert_data_refused(device, "an expert too few", run(&mut dl, &pdw, &pa, &mixed));
        }
    }
}

/// Scores so small that their sum, or they themselves, are lost in a naive formula keep their ratios; saturated sigmoids
/// tie, and large logits have roots.
fn extreme_scores<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let logits = Matrix { rows: 2, cols: 3, data: vec![-30.0, -31.0, -60.0, 200.0, 100.0, 300.0] };
    let ratio = |a: f64, b: f64| [a / (a + b), b / (a + b)];
    for (function, experts, want) in [
        (
            ScoreFunction::Sigmoid { normalize: true },
            [0, 1, 0, 1],
            [ratio((-30f64).exp(), (-31f64).exp()), [0.5, 0.5]],
        ),
        (
            ScoreFunction::SqrtSoftplus { normalize: true },
            [0, 1, 2, 0],
            [ratio((-15f64).exp(), (-15.5f64).exp()), ratio(300f64.sqrt(), 200f64.sqrt())],
        ),
    ] {
        let (routed, out) = route::<A, D>(device, &logits, 2, None, &function.into());
        routed.expect("route");
        assert_eq!(out.experts.elements(), experts, "small and large logits, {function:?}");
        let want = Matrix { rows: 2, cols: 2, data: want.concat() };
        let what = format!("weights of small and large logits, {function:?}");
        assert_close(&what, &out.weights.read(), &want, tolerance.max(1e-6));
    }

    // Roots of softplus and their slopes, where e^x is no number of single precision any more.
    let scoring = Scoring::from(ScoreFunction::SqrtSoftplus { normalize: false });
    let logits = Matrix { rows: 1, cols: 4, data: vec![-41.0, -120.0, -39.5, -15.0] };
    let (routed, out) = route::<A, D>(device, &logits, 4, None, &scoring);
    routed.expect("route");
    let want = Matrix::row(&[-15.0f64, -39.5, -41.0, -120.0].map(|x| (x / 2.0).exp()));
    let got = out.weights.read();
    let relative = Matrix::from_fn(1, 4, |_, k| got.at(0, k) / want.at(0, k));
    assert_close("small roots of softplus", &relative, &Matrix::row(&[1.0; 4]), tolerance.max(1e-6));
    let (none, one) = (Matrix::row(&[0.0; 4]), Matrix::row(&[1.0; 4]));
    let (pl, pd, pa) =
        (place::<A, D>(device, &logits), place::<A, D>(device, &one), place::<A, D>(device, &none));
    let (mut dl, experts) = (output::<A, D>(device, 1, 4), place_ints(device, 1, 4, &[0, 1, 2, 3]));
    device
        .route_backward(dl.view_mut(), pd.view(), experts.view(), pl.view(), &scoring, pa.view(), 0.0)
        .expect("route_backward");
    let got = dl.read();
    let relative = Matrix::from_fn(1, 4, |_, e| got.at(0, e) / ((logits.at(0, e) / 2.0).exp() / 2.0));
    assert_close("slopes of small roots", &relative, &one, tolerance.max(1e-6));
}

/// A choice that was made elsewhere gets the weights of these logits; the plain choice is what it would be.
fn given_choices<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(17);
    let (n, count, k) = (400, 12, 3);
    let logits = distinct_logits::<A>(&mut random, n, count);
    let bias = Matrix::from_fn(1, count, |_, e| e as f64 / 4.0);
    let given: Vec<i32> = (0..n * k).map(|j| ((j / k * 7 + j % k * 5) % count) as i32).collect();
    for scoring in scorings(count, k) {
        let bias = scoring.function.is_separate().then_some(&bias);
        let (routed, out) = route_given::<A, D>(device, &logits, k, bias, Some(&given), &scoring);
        routed.expect("route");
        assert_eq!(out.experts.elements(), given, "given experts, {scoring:?}");
        let plain = chosen(&logits, k, None, &Scoring { groups: None, ..scoring });
        assert_eq!(out.unbiased.elements(), plain, "unbiased, {scoring:?}");
        // Only the plain choice could be otherwise.
        let want = margins(&logits, k, None, &Scoring { groups: None, ..scoring });
        let what = format!("margins of a given choice, {scoring:?}");
        assert_close(&what, &out.margins.read(), &want, tolerance * 64.0);
        let want = weights(&logits, &given, k, &scoring);
        assert_close(
            &format!("weights of a given choice, {scoring:?}"),
            &out.weights.read(),
            &want,
            tolerance,
        );
    }
    let softmax = Scoring::from(ScoreFunction::SoftmaxPost);
    let refused = |what: &str, given: &[i32]| {
        let (result, _) = route_given::<A, D>(device, &logits, k, None, Some(given), &softmax);
        assert_data_refused(device, what, result);
    };
    refused("no such expert", &vec![count as i32; n * k]);
    refused("a negative expert", &vec![-1; n * k]);
    refused("too few choices", &given[k..]);
}

/// Given experts of no probability in any type have the softmax of their own logits for weights, and its gradient; those that
/// have no softmax are refused.
fn unlikely_choices<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let (count, k, z) = (4, 2, 0.3);
    let rows = [[1.0, -200.0, -201.0, 0.0], [1.0, -2001.0, -2000.0, -2002.0], [1.0, 0.5, -3000.0, 0.0]];
    let logits = Matrix { rows: 3, cols: count, data: rows.concat() };
    let given = [1, 2, 2, 1, 2, 1];
    let mut random = Random::new(20);
    let (dw, aux) = (random.matrix::<A>(3, k), random.matrix::<A>(1, count));
    for function in [ScoreFunction::SoftmaxPost, ScoreFunction::SoftmaxPre { normalize: true }] {
        let scoring = Scoring { scale: 2.5, ..function.into() };
        let (routed, out) = route_given::<A, D>(device, &logits, k, None, Some(&given), &scoring);
        routed.expect("route");
        let more = sigmoid(1.0);
        let shares = Matrix { rows: 3, cols: k, data: vec![more, 1.0 - more, more, 1.0 - more, 0.0, 1.0] };
        let want = Matrix::from_fn(3, k, |i, j| 2.5 * shares.at(i, j));
        assert_close("weights of unlikely choices", &out.weights.read(), &want, tolerance);

        let probs = probs(&logits, &scoring);
        let want = Matrix::from_fn(3, count, |i, e| {
            let mean: f64 = (0..count).map(|e| probs.at(i, e) * aux.at(0, e)).sum();
            let of_losses = probs.at(i, e) * (aux.at(0, e) - mean + 2.0 * z * lse(&logits, i));
            let mean: f64 = (0..k).map(|j| shares.at(i, j) * dw.at(i, j)).sum();
            let by_weight = |j: usize| 2.5 * shares.at(i, j) * (dw.at(i, j) - mean);
            of_losses + (0..k).filter(|j| given[i * k + j] == e as i32).map(by_weight).sum::<f64>()
        });
        let (pl, pd, pa) =
            (place::<A, D>(device, &logits), place::<A, D>(device, &dw), place::<A, D>(device, &aux));
        let (mut dl, experts) = (output::<A, D>(device, 3, count), place_ints(device, 3, k, &given));
        device
            .route_backward(dl.view_mut(), pd.view(), experts.view(), pl.view(), &scoring, pa.view(), z)
            .expect("route_backward");
        assert_close("dlogits of unlikely choices", &dl.read(), &want, tolerance * 4.0);

        let mut none = logits.clone();
        none.data[count + 1..count + 3].fill(f64::NEG_INFINITY);
        let (result, _) = route_given::<A, D>(device, &none, k, None, Some(&given), &scoring);
        let result = settled(device, result);
        assert!(matches!(result, Err(Error::NotANumber { row: 1, .. })), "weights of nothing: {result:?}");
    }
}

/// The margin of a choice by itself, of tokens that are close in one comparison each: of experts, of groups, of none.
fn margins_alone<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let close_groups = [5.0, 0.0, 3.0, 2.125, 0.0, 0.0];
    let rows = [[5.0, 0.0, 4.9375, 4.5, 0.0, 0.0], close_groups, [1.0; 6]];
    let logits = place::<A, D>(device, &Matrix { rows: 3, cols: 6, data: rows.concat() });
    let groups = ExpertGroups { count: 3, kept: 1, score_top_k: 2 };
    for (k, groups, want) in [
        (1, None, [0.0625, 2.0, 0.0]),
        (1, Some(groups), [0.4375, 0.125, 0.0]),
        (2, Some(groups), [4.4375, 0.125, 0.0]),
        (6, None, [f64::INFINITY; 3]),
    ] {
        let mut weights = output::<A, D>(device, 3, k);
        let (mut experts, mut probs) = (output_ints(device, 3, k), output::<A, D>(device, 3, 6));
        let (mut lse, mut margins) = (output::<A, D>(device, 1, 3), output::<A, D>(device, 1, 3));
        let views = RouteOutput {
            weights: weights.view_mut(),
            experts: experts.view_mut(),
            unbiased: None,
            probs: probs.view_mut(),
            lse: lse.view_mut(),
            margins: Some(margins.view_mut()),
        };
        let scoring = Scoring { groups, ..ScoreFunction::SoftmaxPost.into() };
        device.route(views, RouteInput::new(logits.view()), &scoring).expect("route");
        assert_eq!(margins.read().data, want, "margins of {k} choices, {groups:?}");
    }
}

fn softmax_sums<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(19);
    let softmax = Scoring::from(ScoreFunction::SoftmaxPost);
    for (n, count) in [(0, 4), (1, 1), (7, 6), (900, 17)] {
        let (logits, bias) = (random.matrix::<A>(n, count), random.matrix::<A>(1, count));
        let biased = Matrix::from_fn(n, count, |i, e| logits.at(i, e) + bias.at(0, e));
        let probs = probs(&biased, &softmax);
        let (pl, pb) = (place::<A, D>(device, &logits), place::<A, D>(device, &bias));
        let mut sums = output::<f64, D>(device, 1, count);
        device.softmax_sums(sums.view_mut(), pl.view(), pb.view(), None).expect("softmax_sums");
        let want = Matrix::from_fn(1, count, |_, e| (0..n).map(|i| probs.at(i, e)).sum());
        assert_close("sums of softmaxes", &sums.read(), &want, tolerance);
        // Padding, also what is no number, adds nothing.
        let mut padded = logits.clone();
        padded.data.chunks_mut(count).step_by(3).for_each(|row| row.fill(f64::NAN));
        let valid: Vec<i32> = (0..n).map(|i| i32::from(i % 3 != 0)).collect();
        let (pl, pv) = (place::<A, D>(device, &padded), place_ints(device, 1, n, &valid));
        device.softmax_sums(sums.view_mut(), pl.view(), pb.view(), Some(pv.view())).expect("softmax_sums");
        let of_valid = |e| (0..n).filter(|i| i % 3 != 0).map(|i| probs.at(i, e)).sum();
        let want = Matrix::from_fn(1, count, |_, e| of_valid(e));
        assert_close("sums of softmaxes but padding", &sums.read(), &want, tolerance);
        let short = place::<A, D>(device, &random.matrix::<A>(1, count + 1));
        assert_refused("other bias", device.softmax_sums(sums.view_mut(), pl.view(), short.view(), None));
    }
}

/// By the definition, element by element; the factors depend on nothing but key, token and column.
fn jitter<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(18);
    for (n, width) in [(0, 4), (1, 1), (7, 5), (400, 34)] {
        let x = random.matrix::<A>(n, width);
        let tokens: Vec<i64> = (0..n as i64).map(|i| (i * 37) % 101 + ((i % 3) << 33)).collect();
        let placed = place_elements::<i64, D>(device, 1, n, &tokens, -1);
        let (key, epsilon) = (0xA1B2_C3D4_E5F6_0718, 0.25);
        let mut y = place::<A, D>(device, &x);
        device.jitter(y.view_mut(), placed.view(), key, epsilon).expect("jitter");
        let want = Matrix::from_fn(n, width, |i, h| {
            let u = uniform_pair(key, tokens[i] as u64, h as u64 / 2)[h % 2];
            x.at(i, h) * (0.75 + 0.5 * u)
        });
        assert_close("jitter", &y.read(), &want, tolerance);
        let short = place_elements::<i64, D>(device, 1, n + 1, &vec![0; n + 1], -1);
        assert_refused("other tokens", device.jitter(y.view_mut(), short.view(), key, epsilon));
        assert_refused("no epsilon", device.jitter(y.view_mut(), placed.view(), key, f64::NAN));
    }
}

/// Tokens beside padding are what they are alone, whatever padding holds; padding is nothing, and has no gradient.
fn padding<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let mut random = Random::new(19);
    let (n, count, k) = (400, 12, 3);
    let logits = distinct_logits::<A>(&mut random, n, count);
    let valid: Vec<i32> = (0..n).map(|i| i32::from(i % 7 < 4 && i != 100)).collect();
    let is_valid = |i: usize| valid[i] != 0;
    let spoilt = Matrix::from_fn(n, count, |i, e| if is_valid(i) { logits.at(i, e) } else { f64::NAN });
    let rows: Vec<usize> = (0..n).filter(|&i| is_valid(i)).collect();
    let compact = |m: &Matrix| Matrix::from_fn(rows.len(), m.cols, |i, j| m.at(rows[i], j));
    let of_valid =
        |ints: Vec<i32>| rows.iter().flat_map(|&i| ints[i * k..][..k].to_vec()).collect::<Vec<_>>();
    let dw = random.matrix::<A>(n, k);
    let aux = random.matrix::<A>(1, count);
    for scoring in scorings(count, k) {
        let what = |what: &str| format!("{what} beside padding, {scoring:?}");
        let (routed, alone) = route::<A, D>(device, &compact(&logits), k, None, &scoring);
        routed.expect("route");
        let mut out = Routed {
            weights: output(device, n, k),
            experts: output_ints(device, n, k),
            unbiased: output_ints(device, n, k),
            probs: output(device, n, count),
            lse: output(device, 1, n),
            margins: output(device, 1, n),
        };
        let (placed, mask) = (place::<A, D>(device, &spoilt), place_ints(device, 1, n, &valid));
        let views = RouteOutput {
            weights: out.weights.view_mut(),
            experts: out.experts.view_mut(),
            unbiased: Some(out.unbiased.view_mut()),
            probs: out.probs.view_mut(),
            lse: out.lse.view_mut(),
            margins: Some(out.margins.view_mut()),
        };
        let input = RouteInput { valid: Some(mask.view()), ..RouteInput::new(placed.view()) };
        device.route(views, input, &scoring).expect("route");
        let experts = out.experts.elements();
        for (ints, want) in [(&out.experts, &alone.experts), (&out.unbiased, &alone.unbiased)] {
            let ints = ints.elements();
            let padded =
                (0..n).filter(|&i| !is_valid(i)).all(|i| ints[i * k..][..k].iter().all(|&e| e == -1));
            assert!(padded && of_valid(ints) == want.elements(), "{}", what("experts"));
        }
        let [weights, probs] = [&out.weights, &out.probs].map(Placed::read);
        assert_close(&what("weights"), &compact(&weights), &alone.weights.read(), 0.0);
        assert_close(&what("probs"), &compact(&probs), &alone.probs.read(), 0.0);
        assert_close(
            &what("lse"),
            &compact(&out.lse.read().transposed()),
            &alone.lse.read().transposed(),
            0.0,
        );
        let margins = out.margins.read().transposed();
        assert_close(&what("margins"), &compact(&margins), &alone.margins.read().transposed(), 0.0);
        let infinite = (0..n).filter(|&i| !is_valid(i)).all(|i| margins.at(i, 0) == f64::INFINITY);
        assert!(infinite, "{}", what("margins of padding"));
        let nothing = |m: &Matrix, i: usize| (0..m.cols).all(|j| m.at(i, j) == 0.0);
        let lse = out.lse.read().transposed();
        let padded = (0..n)
            .filter(|&i| !is_valid(i))
            .all(|i| nothing(&weights, i) && nothing(&probs, i) && nothing(&lse, i));
        assert!(padded, "{}", what("zeros"));

        let backward = |logits: &Placed<A, D>, dw: &Matrix, experts: &[i32]| {
            let (dw, aux) = (place::<A, D>(device, dw), place::<A, D>(device, &aux));
            let mut dl = output::<A, D>(device, dw.read().rows, count);
            let experts = place_ints(device, experts.len() / k, k, experts);
            device
                .route_backward(
                    dl.view_mut(),
                    dw.view(),
                    experts.view(),
                    logits.view(),
                    &scoring,
                    aux.view(),
                    0.3,
                )
                .expect("route_backward");
            dl.read()
        };
        let got = backward(&placed, &dw, &experts);
        let alone = place::<A, D>(device, &compact(&logits));
        let want = backward(&alone, &compact(&dw), &of_valid(experts));
        assert_close(&what("dlogits"), &compact(&got), &want, 0.0);
        assert!((0..n).filter(|&i| !is_valid(i)).all(|i| nothing(&got, i)), "{}", what("gradients"));
    }
}

fn refusals<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let logits = Random::new(16).matrix::<A>(3, 6);
    let softmax = Scoring::from(ScoreFunction::SoftmaxPost);
    let refused = |what: &str, k, bias: Option<&Matrix>, scoring| {
        assert_refused(what, route::<A, D>(device, &logits, k, bias, &scoring).0);
    };
    refused("no choice", 0, None, softmax);
    refused("more choices than experts", 7, None, softmax);
    let bias = Matrix::from_fn(1, 6, |_, _| 0.0);
    let groups = Some(ExpertGroups { count: 3, kept: 2, score_top_k: 2 });
    refused("a bias on a softmax in groups", 2, Some(&bias), Scoring { groups, ..softmax });
    let sigmoid = Scoring::from(ScoreFunction::Sigmoid { normalize: true });
    refused("a short bias", 2, Some(&Matrix::from_fn(1, 5, |_, _| 0.0)), sigmoid);
    for (what, k, count, kept, score_top_k) in [
        ("no groups", 2, 0, 1, 1),
        ("groups of unequal size", 2, 4, 2, 1),
        ("no group kept", 2, 3, 0, 1),
        ("more groups kept than there are", 2, 3, 4, 1),
        ("a score of no experts", 2, 3, 2, 0),
        ("a score of more experts than a group has", 2, 3, 2, 3),
        ("more choices than the kept groups have", 3, 3, 1, 1),
    ] {
        let groups = Some(ExpertGroups { count, kept, score_top_k });
        refused(what, k, None, Scoring { groups, ..softmax });
    }
}

fn not_a_number<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let (n, count, k) = (900, 3, 2);
    for function in [ScoreFunction::SoftmaxPost, ScoreFunction::Sigmoid { normalize: true }] {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut logits = Random::new(14).matrix::<A>(n, count);
            for row in [899, 521, 700] {
                logits.data[row * count + 1] = bad;
            }
            let (result, _) = route::<A, D>(device, &logits, k, None, &function.into());
            let result = settled(device, result);
            let named = matches!(result, Err(Error::NotANumber { row: 521, .. }));
            assert!(named, "a logit of {bad} in row 521, the first of three, must be named, not {result:?}");
        }
    }
}
