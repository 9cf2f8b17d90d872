//! Router scores, choice and sorting.

use super::GRADIENT;
use super::host::{
    Matrix, Random, assert_close, assert_refused, gradient, output, output_ints, place, place_ints,
};
use crate::family::{Routing, ScoreFunction};
use crate::{Error, Float};

const SCORES: [ScoreFunction; 3] = [
    ScoreFunction::SoftmaxPost,
    ScoreFunction::SoftmaxPre { normalize: false },
    ScoreFunction::SoftmaxPre { normalize: true },
];

fn lse(logits: &Matrix, i: usize) -> f64 {
    (0..logits.cols).map(|e| logits.at(i, e).exp()).sum::<f64>().ln()
}

fn probs(logits: &Matrix) -> Matrix {
    Matrix::from_fn(logits.rows, logits.cols, |i, e| (logits.at(i, e) - lse(logits, i)).exp())
}

/// The weights of fixed choices.
fn weights(logits: &Matrix, experts: &[i32], k: usize, score: ScoreFunction) -> Matrix {
    Matrix::from_fn(logits.rows, k, |i, slot| {
        let chosen = || experts[i * k..(i + 1) * k].iter().map(|&e| logits.at(i, e as usize));
        let over: f64 = match score {
            ScoreFunction::SoftmaxPre { normalize: false } => lse(logits, i).exp(),
            _ => chosen().map(f64::exp).sum(),
        };
        chosen().nth(slot).map_or(f64::NAN, f64::exp) / over
    })
}

/// [`Routing`]: scores, ties, gradients with auxiliary and z-loss, not-a-number, the stable sort.
pub fn routing<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    choice::<A, D>(device, tolerance);
    not_a_number::<A, D>(device);
    sorting::<A, D>(device);
}

fn choice<A: Float<Acc = A>, D: Routing<A>>(device: &D, tolerance: f64) {
    let mut random = Random::new(13);
    for (n, count, k) in [(0, 4, 2), (1, 1, 1), (7, 5, 2), (9, 8, 8), (6, 17, 3), (400, 60, 4)] {
        let mut logits = random.matrix::<A>(n, count);
        logits.data.iter_mut().for_each(|x| *x *= 4.0);
        if n > 2 {
            // Ties: all equal, then some.
            logits.data[..count].fill(0.5);
            for e in (0..count).step_by(2) {
                logits.data[count + e] = 3.0;
            }
        }
        let mut experts = Vec::new();
        for i in 0..n {
            let mut ids: Vec<usize> = (0..count).collect();
            ids.sort_by(|&a, &b| logits.at(i, b).total_cmp(&logits.at(i, a)).then(a.cmp(&b)));
            experts.extend(ids[..k].iter().map(|&e| e as i32));
        }
        let pl = place::<A, D>(device, &logits);
        for score in SCORES {
            let what = format!("{n} tokens, {k} of {count}, {score:?}");
            let (mut w, mut e) = (output::<A, D>(device, n, k), output_ints(device, n, k));
            let (mut p, mut l) = (output::<A, D>(device, n, count), output::<A, D>(device, 1, n));
            device
                .route(w.view_mut(), e.view_mut(), p.view_mut(), l.view_mut(), pl.view(), score)
                .expect("route");
            assert_eq!(e.elements(), experts, "experts, {what}");
            assert_close(&format!("probs, {what}"), &p.read(), &probs(&logits), tolerance);
            let want = Matrix::from_fn(1, n, |_, i| lse(&logits, i));
            assert_close(&format!("lse, {what}"), &l.read(), &want, tolerance);
            assert_close(
                &format!("weights, {what}"),
                &w.read(),
                &weights(&logits, &experts, k, score),
                tolerance,
            );

            if n * count > 1000 {
                continue;
            }
            let (dw, aux) = (random.matrix::<A>(n, k), random.matrix::<A>(1, count));
            for (aux, z) in [(Matrix::from_fn(1, count, |_, _| 0.0), 0.0), (aux, 0.3)] {
                let want = gradient(&logits, |logits| {
                    let pi = probs(logits);
                    let all = Matrix::from_fn(n, count, |_, e| aux.at(0, e));
                    let z_loss: f64 = (0..n).map(|i| z * lse(logits, i).powi(2)).sum();
                    weights(logits, &experts, k, score).dot(&dw) + pi.dot(&all) + z_loss
                });
                let (pdw, pa) = (place::<A, D>(device, &dw), place::<A, D>(device, &aux));
                let mut dl = output::<A, D>(device, n, count);
                let run = |dl: &mut super::host::Placed<A, D>, dw: &super::host::Placed<A, D>, e: &[i32]| {
                    let e = place_ints(device, n, k, e);
                    let dl = dl.view_mut();
                    device.route_backward(
                        dl,
                        dw.view(),
                        w.view(),
                        e.view(),
                        p.view(),
                        l.view(),
                        score,
                        pa.view(),
                        z,
                    )
                };
                run(&mut dl, &pdw, &experts).expect("route_backward");
                assert_close(&format!("dlogits, {what}"), &dl.read(), &want, tolerance.max(GRADIENT) * 4.0);
                let wrong = place::<A, D>(device, &random.matrix::<A>(n, k + 1));
                assert_refused("dweights", run(&mut dl, &wrong, &experts));
                for e in [-1, count as i32].into_iter().filter(|_| n > 0) {
                    assert_refused("no such expert", run(&mut dl, &pdw, &vec![e; n * k]));
                }
            }
        }
        // More than there are, and none.
        for k in [0, count + 1] {
            let (mut w, mut e) = (output::<A, D>(device, n, k), output_ints(device, n, k));
            let (mut p, mut l) = (output::<A, D>(device, n, count), output::<A, D>(device, 1, n));
            let refused =
                device.route(w.view_mut(), e.view_mut(), p.view_mut(), l.view_mut(), pl.view(), SCORES[0]);
            assert_refused("k", refused);
        }
    }
}

fn not_a_number<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let (n, count, k) = (900, 3, 2);
    for bad in [f64::NAN, f64::INFINITY] {
        let mut logits = Random::new(14).matrix::<A>(n, count);
        for row in [899, 521, 700] {
            logits.data[row * count + 1] = bad;
        }
        let pl = place::<A, D>(device, &logits);
        let (mut w, mut e) = (output::<A, D>(device, n, k), output_ints(device, n, k));
        let (mut p, mut l) = (output::<A, D>(device, n, count), output::<A, D>(device, 1, n));
        let result =
            device.route(w.view_mut(), e.view_mut(), p.view_mut(), l.view_mut(), pl.view(), SCORES[0]);
        let named = matches!(result, Err(Error::NotANumber { row: 521, .. }));
        assert!(named, "a logit of {bad} in row 521, the first of three, must be named, not {result:?}");
    }
}

fn sorting<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let mut random = Random::new(15);
    for (n, k, count) in [(0, 2, 3), (7, 2, 4), (5, 1, 1), (300, 3, 11), (6, 2, 0)] {
        for skew in ["spread", "one", "dropped"] {
            let mut experts = random.ints(n * k, count.max(1));
            match skew {
                "one" => experts.fill(count as i32 - 1),
                "dropped" => experts.iter_mut().step_by(3).for_each(|e| *e = -1),
                _ => {}
            }
            if count == 0 {
                experts.fill(-1);
            }
            let mut sorted: Vec<usize> = (0..n * k).filter(|&j| experts[j] >= 0).collect();
            sorted.sort_by_key(|&j| experts[j]);
            let mut order: Vec<i32> = sorted.iter().map(|&j| j as i32).collect();
            order.resize(n * k, -1);
            let place_of = |j: usize| sorted.iter().position(|&s| s == j).map_or(-1, |p| p as i32);
            let position: Vec<i32> = (0..n * k).map(place_of).collect();
            let before = |e: i32| experts.iter().filter(|&&x| x >= 0 && x < e).count() as i32;
            let offsets: Vec<i32> = (0..=count as i32).map(before).collect();

            let pe = place_ints(device, n, k, &experts);
            let (mut o, mut p) = (output_ints(device, 1, n * k), output_ints(device, n, k));
            let mut f = output_ints(device, 1, count + 1);
            device
                .sort_by_expert(o.view_mut(), p.view_mut(), f.view_mut(), pe.view())
                .expect("sort_by_expert");
            assert_eq!(o.elements(), order, "order, {skew}");
            assert_eq!(p.elements(), position, "position, {skew}");
            assert_eq!(f.elements(), offsets, "offsets, {skew}");

            if n > 0 {
                let outside = place_ints(device, n, k, &vec![count as i32; n * k]);
                let refused = device.sort_by_expert(o.view_mut(), p.view_mut(), f.view_mut(), outside.view());
                assert_refused("no such expert", refused);
            }
            let mut none = output_ints(device, 1, 0);
            let refused = device.sort_by_expert(o.view_mut(), p.view_mut(), none.view_mut(), pe.view());
            assert_refused("offsets", refused);
        }
    }
}
