//! Root-mean-square normalisation.

use super::GRADIENT;
use super::host::{Matrix, Placed, Random, assert_close, assert_refused, gradient, output, place};
use crate::Float;
use crate::family::{Elementwise, Norm};

const EPS: f64 = 1e-3;

fn rstd(x: &Matrix) -> Matrix {
    let mean = |i: usize| (0..x.cols).map(|c| x.at(i, c).powi(2)).sum::<f64>() / x.cols as f64;
    Matrix::from_fn(1, x.rows, |_, i| 1.0 / (mean(i) + EPS).sqrt())
}

fn forward(x: &Matrix, w: &Matrix) -> Matrix {
    let r = rstd(x);
    Matrix::from_fn(x.rows, x.cols, |i, c| x.at(i, c) * r.at(0, i) * w.at(0, c))
}

/// [`Norm`]; the weight gradient adds to what is there.
pub fn norm<T: Float, D: Norm<T> + Elementwise<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(6);
    for (n, h) in [(0, 4), (1, 1), (5, 7), (3, 64), (23, 19), (131, 257)] {
        let what = format!("{n}×{h}");
        let (mut x, w) = (random.matrix::<T>(n, h), random.matrix::<T>(1, h));
        if n > 2 {
            x.data[..h].fill(0.0);
        }
        let (px, pw) = (place::<T, D>(device, &x), place::<T, D>(device, &w));
        let (mut y, mut r) = (output::<T, D>(device, n, h), output::<T::Acc, D>(device, 1, n));
        device.rms_norm(y.view_mut(), r.view_mut(), px.view(), pw.view(), EPS).expect("rms_norm");
        assert_close(&format!("rms_norm {what}"), &y.read(), &forward(&x, &w), tolerance);
        assert_close(&format!("rstd {what}"), &r.read(), &rstd(&x), tolerance);
        let mut wrong = output::<T::Acc, D>(device, 1, n + 1);
        assert_refused("rstd", device.rms_norm(y.view_mut(), wrong.view_mut(), px.view(), pw.view(), EPS));

        let r_added = random.matrix::<T>(n, h);
        let sum = Matrix::from_fn(n, h, |i, c| T::from_f64(x.at(i, c) + r_added.at(i, c)).to_f64());
        let added = place::<T, D>(device, &r_added);
        let (mut s, mut y, mut r2) =
            (output::<T, D>(device, n, h), output::<T, D>(device, n, h), output::<T::Acc, D>(device, 1, n));
        let mut run = |s: &mut Placed<T, D>, added: &Placed<T, D>| {
            let (x, w, added) = (px.view(), pw.view(), added.view());
            device.add_rms_norm(s.view_mut(), y.view_mut(), r2.view_mut(), x, added, w, EPS)
        };
        let mut wrong = output::<T, D>(device, n + 1, h);
        assert_refused("r", run(&mut s, &wrong));
        assert_refused("sum", run(&mut wrong, &added));
        run(&mut s, &added).expect("add_rms_norm");
        assert_close(&format!("x + r {what}"), &s.read(), &sum, 0.0);
        assert_close(&format!("norm of a sum {what}"), &y.read(), &forward(&sum, &w), tolerance);
        assert_close(&format!("rstd of a sum {what}"), &r2.read(), &rstd(&sum), tolerance);

        if n * h > 1000 {
            continue;
        }
        let (dy, dw) = (random.matrix::<T>(n, h), random.matrix::<T::Acc>(1, h));
        let pdy = place::<T, D>(device, &dy);
        let (mut dx, mut pdw) = (output::<T, D>(device, n, h), place::<T::Acc, D>(device, &dw));
        let backward = |dx: &mut Placed<T, D>, dw: &mut Placed<T::Acc, D>, past: Option<&Placed<T, D>>| {
            let (dy, x, w) = (pdy.view(), px.view(), pw.view());
            device.rms_norm_backward(dx.view_mut(), dw.view_mut(), dy, x, w, r.view(), past.map(Placed::view))
        };
        backward(&mut dx, &mut pdw, None).expect("rms_norm_backward");
        let tolerance = tolerance.max(GRADIENT);
        let want = gradient(&x, |x| forward(x, &w).dot(&dy));
        // The row of zeros has a steep gradient: compare it alone.
        let split = |m: &Matrix, rows: std::ops::Range<usize>| {
            Matrix::from_fn(rows.len(), h, |i, c| m.at(rows.start + i, c))
        };
        let zeros = usize::from(n > 2);
        let got = dx.read();
        let steep = split(&want, 0..zeros);
        // Fourth order differences across the scale of √eps.
        assert_close(&format!("dx of zeros {what}"), &split(&got, 0..zeros), &steep, tolerance.max(1e-2));
        assert_close(
            &format!("dx {what}"),
            &split(&got, zeros..n),
            &split(&want, zeros..n),
            tolerance * 10.0,
        );
        let want = dw.plus(&gradient(&w, |w| forward(&x, w).dot(&dy)));
        assert_close(&format!("dw {what}"), &pdw.read(), &want, tolerance);
        let past = random.matrix::<T>(n, h);
        let (mut added, mut again) = (output::<T, D>(device, n, h), place::<T::Acc, D>(device, &dw));
        let result = backward(&mut added, &mut again, Some(&place::<T, D>(device, &past)));
        result.expect("rms_norm_backward with a residual");
        assert_close(&format!("dx and past {what}"), &added.read(), &got.plus(&past), tolerance);
        assert_close(&format!("dw again {what}"), &again.read(), &pdw.read(), 0.0);
        let mut wrong = output::<T, D>(device, n + 1, h);
        assert_refused("past", backward(&mut dx, &mut pdw, Some(&wrong)));
        assert_refused("dx", backward(&mut wrong, &mut pdw, None));
    }
    parts::<T, D>(device, tolerance);
    // Sums over more rows than one piece of work: dw is exact where dy, x and rstd are powers of two.
    let (n, h) = (1100, 33);
    let x = Matrix::from_fn(n, h, |i, _| if i % 2 == 0 { 1.0 } else { -1.0 });
    let dy = Matrix::from_fn(n, h, |i, c| if (i + c) % 3 == 0 { 1.0 } else { 0.0 });
    let ones = Matrix::from_fn(1, h, |_, _| 1.0);
    let r = Matrix::from_fn(1, n, |_, _| 0.5);
    let (px, pdy) = (place::<T, D>(device, &x), place::<T, D>(device, &dy));
    let (pw, pr) = (place::<T, D>(device, &ones), place::<T::Acc, D>(device, &r));
    let (mut dx, mut dw) = (output::<T, D>(device, n, h), place::<T::Acc, D>(device, &ones));
    device
        .rms_norm_backward(dx.view_mut(), dw.view_mut(), pdy.view(), px.view(), pw.view(), pr.view(), None)
        .expect("rms_norm_backward");
    let want =
        Matrix::from_fn(1, h, |_, c| 1.0 + (0..n).map(|i| 0.5 * dy.at(i, c) * x.at(i, c)).sum::<f64>());
    assert_close("dw of many rows", &dw.read(), &want, 0.0);
}

/// Rows whose elements are spread over ranks, as unequally as can be: parts of them, and the sums over the parts.
fn parts<T: Float, D: Norm<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(61);
    for (n, widths) in [(0, vec![3, 2]), (5, vec![7]), (7, vec![3, 20, 1]), (23, vec![16, 13])] {
        let h: usize = widths.iter().sum();
        let what = format!("{n}×{widths:?}");
        let (x, w) = (random.matrix::<T>(n, h), random.matrix::<T>(1, h));
        let (dy, dw) = (random.matrix::<T>(n, h), random.matrix::<T::Acc>(1, h));
        let starts = widths.iter().scan(0, |end, width| Some(std::mem::replace(end, *end + width)));
        let columns: Vec<_> = starts.zip(&widths).map(|(start, width)| start..start + width).collect();
        let part = |m: &Matrix, c: &std::ops::Range<usize>| {
            Matrix::from_fn(m.rows, c.len(), |i, j| m.at(i, c.start + j))
        };
        let added = |of_part: &dyn Fn(&std::ops::Range<usize>) -> Matrix| {
            let zeros = Matrix::from_fn(1, n, |_, _| 0.0);
            place::<T::Acc, D>(device, &columns.iter().fold(zeros, |sum, c| sum.plus(&of_part(c))))
        };
        let squares = added(&|c| {
            let (px, mut sums) = (place::<T, D>(device, &part(&x, c)), output::<T::Acc, D>(device, 1, n));
            device.rms_norm_sums(sums.view_mut(), px.view()).expect("rms_norm_sums");
            sums.read()
        });
        let products = added(&|c| {
            let [px, pdy, pw] = [&x, &dy, &w].map(|m| place::<T, D>(device, &part(m, c)));
            let mut sums = output::<T::Acc, D>(device, 1, n);
            let result = device.rms_norm_backward_sums(sums.view_mut(), pdy.view(), px.view(), pw.view());
            result.expect("rms_norm_backward_sums");
            sums.read()
        });
        let tolerance = tolerance.max(GRADIENT);
        let want_dx = gradient(&x, |x| forward(x, &w).dot(&dy));
        let want_dw = dw.plus(&gradient(&w, |w| forward(&x, w).dot(&dy)));
        for c in &columns {
            let [px, pdy, pw] = [&x, &dy, &w].map(|m| place::<T, D>(device, &part(m, c)));
            let (mut y, mut r) = (output::<T, D>(device, n, c.len()), output::<T::Acc, D>(device, 1, n));
            let sums = squares.view();
            let result = device.rms_norm_part(y.view_mut(), r.view_mut(), px.view(), pw.view(), sums, h, EPS);
            result.expect("rms_norm_part");
            assert_close(&format!("rms_norm_part {what}"), &y.read(), &part(&forward(&x, &w), c), tolerance);
            assert_close(&format!("rstd of a part {what}"), &r.read(), &rstd(&x), tolerance);

            let mut dx = output::<T, D>(device, n, c.len());
            let mut pdw = place::<T::Acc, D>(device, &part(&dw, c));
            let result = device.rms_norm_part_backward(
                dx.view_mut(),
                pdw.view_mut(),
                pdy.view(),
                px.view(),
                pw.view(),
                r.view(),
                products.view(),
                h,
            );
            result.expect("rms_norm_part_backward");
            assert_close(&format!("dx of a part {what}"), &dx.read(), &part(&want_dx, c), tolerance * 10.0);
            assert_close(&format!("dw of a part {what}"), &pdw.read(), &part(&want_dw, c), tolerance * 10.0);
        }
        let (px, mut wrong) = (place::<T, D>(device, &x), output::<T::Acc, D>(device, 1, n + 1));
        assert_refused("sums", device.rms_norm_sums(wrong.view_mut(), px.view()));
    }
}
