//! Vocabulary-parallel cross-entropy.

use super::GRADIENT;
use super::host::{Matrix, Random, assert_close, assert_refused, gradient, output, place, place_ints};
use crate::Float;
use crate::family::Loss;

fn lse(logits: &Matrix, i: usize) -> f64 {
    let row = || (0..logits.cols).map(|c| logits.at(i, c));
    let max = row().fold(f64::NEG_INFINITY, f64::max);
    if logits.cols == 0 { max } else { max + row().map(|x| (x - max).exp()).sum::<f64>().ln() }
}

/// Σ scale · (lse − target).
fn objective(logits: &Matrix, labels: &[i32], scale: &Matrix) -> f64 {
    let ce = |i: usize| lse(logits, i) - logits.at(i, labels[i] as usize);
    (0..logits.rows).map(|i| scale.at(0, i) * ce(i)).sum()
}

/// [`Loss`]: a vocabulary in blocks, an empty one among them, merges to the loss of the whole; large logits.
pub fn loss<T: Float, D: Loss<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(10);
    let cases: [(usize, &[usize]); 5] =
        [(1, &[1]), (6, &[5, 4, 1]), (3, &[17, 0]), (0, &[4]), (150, &[131, 130])];
    for (n, sizes) in cases {
        let what = format!("{n} tokens, blocks {sizes:?}");
        let vocabulary: usize = sizes.iter().sum();
        let mut logits = random.matrix::<T>(n, vocabulary);
        for (i, x) in logits.data.iter_mut().enumerate() {
            // Beyond where exp overflows, and far from each other.
            *x = T::from_f64(*x * 4.0 + if i / vocabulary % 3 == 1 { 1000.0 } else { 0.0 }).to_f64();
        }
        let labels = random.ints(n, vocabulary);
        let scale = random.matrix::<T::Acc>(1, n);
        let (pl, ps) = (place_ints(device, 1, n, &labels), place::<T::Acc, D>(device, &scale));

        let want_lse = Matrix::from_fn(1, n, |_, i| lse(&logits, i));
        // Rounding of the log-sum-exp, which is of the size of the logits, comes into the exponent.
        let large = want_lse.data.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        let of_gradients = (tolerance * large).max(GRADIENT * large);
        let (mut parts, mut targets, mut first) = (Vec::new(), vec![0.0; n], 0);
        for &size in sizes {
            let block = Matrix::from_fn(n, size, |i, c| logits.at(i, first + c));
            let px = place::<T, D>(device, &block);
            let (mut part, mut target) =
                (output::<T::Acc, D>(device, 1, n), output::<T::Acc, D>(device, 1, n));
            device
                .cross_entropy(part.view_mut(), target.view_mut(), px.view(), pl.view(), first)
                .expect("cross_entropy");
            let want = Matrix::from_fn(1, n, |_, i| lse(&block, i));
            assert_close(&format!("lse of a block, {what}"), &part.read(), &want, tolerance);
            let inside = |i: usize| (first..first + size).contains(&(labels[i] as usize));
            let want =
                Matrix::from_fn(1, n, |_, i| if inside(i) { logits.at(i, labels[i] as usize) } else { 0.0 });
            assert_close(&format!("target, {what}"), &target.read(), &want, 0.0);
            parts.extend(part.read().data);
            targets.iter_mut().zip(target.read().data).for_each(|(sum, t)| *sum += t);

            // The gradient needs the merged log-sum-exp.
            let plse = place::<T::Acc, D>(device, &want_lse);
            let mut dx = place::<T, D>(device, &block);
            device
                .cross_entropy_backward(dx.view_mut(), plse.view(), pl.view(), first, ps.view())
                .expect("cross_entropy_backward");
            if n * vocabulary < 1000 {
                let want = gradient(&block, |block| {
                    let whole = |i: usize, c: usize| {
                        if (first..first + size).contains(&c) {
                            block.at(i, c - first)
                        } else {
                            logits.at(i, c)
                        }
                    };
                    objective(&Matrix::from_fn(n, vocabulary, whole), &labels, &scale)
                });
                assert_close(&format!("dlogits, {what}"), &dx.read(), &want, of_gradients);
            }
            let mut wrong = output::<T::Acc, D>(device, 1, n + 1);
            let refused =
                device.cross_entropy_backward(dx.view_mut(), wrong.view(), pl.view(), first, ps.view());
            assert_refused("lse", refused);
            let refused =
                device.cross_entropy(wrong.view_mut(), target.view_mut(), px.view(), pl.view(), first);
            assert_refused("lse", refused);
            first += size;
        }

        let parts = Matrix { rows: sizes.len(), cols: n, data: parts };
        let mut merged = output::<T::Acc, D>(device, 1, n);
        device.merge_lse(merged.view_mut(), place(device, &parts).view()).expect("merge_lse");
        assert_close(&format!("merged lse, {what}"), &merged.read(), &want_lse, tolerance);
        let want_target = Matrix::from_fn(1, n, |_, i| logits.at(i, labels[i] as usize));
        assert_close(&format!("targets, {what}"), &Matrix::row(&targets), &want_target, tolerance);

        // All at once, where the vocabulary is one block.
        let (mut lse, mut target) = (output::<T::Acc, D>(device, 1, n), output::<T::Acc, D>(device, 1, n));
        let mut dx = place::<T, D>(device, &logits);
        device
            .cross_entropy_whole(lse.view_mut(), target.view_mut(), dx.view_mut(), pl.view(), ps.view())
            .expect("cross_entropy_whole");
        assert_close(&format!("lse at once, {what}"), &lse.read(), &want_lse, tolerance);
        assert_close(&format!("target at once, {what}"), &target.read(), &want_target, 0.0);
        if n * vocabulary < 1000 {
            let want = gradient(&logits, |logits| objective(logits, &labels, &scale));
            assert_close(&format!("dlogits at once, {what}"), &dx.read(), &want, of_gradients);
        }
        let mut wrong = output::<T::Acc, D>(device, 1, n + 1);
        let refused = device.cross_entropy_whole(
            wrong.view_mut(),
            target.view_mut(),
            dx.view_mut(),
            pl.view(),
            ps.view(),
        );
        assert_refused("lse", refused);
    }

    // A NaN is never hidden.
    let px = place::<T, D>(device, &Matrix::row(&[0.0, f64::NAN, 1.0]));
    let labels = place_ints(device, 1, 1, &[0]);
    let (mut part, mut target) = (output::<T::Acc, D>(device, 1, 1), output::<T::Acc, D>(device, 1, 1));
    device
        .cross_entropy(part.view_mut(), target.view_mut(), px.view(), labels.view(), 0)
        .expect("cross_entropy");
    assert!(part.read().data[0].is_nan(), "the log-sum-exp over a NaN is NaN");

    let none = Matrix { rows: 0, cols: 3, data: Vec::new() };
    let mut merged = output::<T::Acc, D>(device, 1, 3);
    device.merge_lse(merged.view_mut(), place(device, &none).view()).expect("merge_lse");
    assert_eq!(merged.read().data, [f64::NEG_INFINITY; 3]);
    let mut wrong = output::<T::Acc, D>(device, 1, 2);
    assert_refused("lse", device.merge_lse(wrong.view_mut(), place(device, &none).view()));
}
