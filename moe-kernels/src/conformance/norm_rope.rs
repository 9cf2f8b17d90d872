//! Heads normed, then rotated.

use super::GRADIENT;
use super::host::{
    Matrix, Placed, Random, assert_close, assert_data_refused, assert_refused, gradient, output, place,
    place_ints,
};
use crate::Float;
use crate::family::{Norm, Rope, RotaryHead, RotaryPairs, Rows};

const EPS: f64 = 1e-3;

/// What a token's position turns its heads by.
struct Tables {
    cos: Matrix,
    sin: Matrix,
    positions: Vec<i32>,
}

/// `rsqrt(mean(x²) + eps)` of each head, head by head of each token.
fn rstd(x: &Matrix, head_dim: usize) -> Matrix {
    let heads = x.cols / head_dim;
    Matrix::from_fn(1, x.rows * heads, |_, i| {
        let square = |d| x.at(i / heads, i % heads * head_dim + d).powi(2);
        1.0 / ((0..head_dim).map(square).sum::<f64>() / head_dim as f64 + EPS).sqrt()
    })
}

fn forward(x: &Matrix, w: &Matrix, tables: &Tables, head: RotaryHead) -> Matrix {
    let RotaryHead { head_dim, first, pairs } = head;
    let (heads, half, r) = (x.cols / head_dim, tables.cos.cols, rstd(x, head_dim));
    let normed = |i, h, d| x.at(i, h * head_dim + d) * r.at(0, i * heads + h) * w.at(0, d);
    Matrix::from_fn(x.rows, x.cols, |i, column| {
        let (h, d) = (column / head_dim, column % head_dim);
        let Some(d) = d.checked_sub(first).filter(|&d| d < 2 * half) else { return normed(i, h, d) };
        // The pair, and whether this is its real part.
        let (j, real, partner) = match pairs {
            RotaryPairs::Halves => (d % half, d < half, (d + half) % (2 * half)),
            RotaryPairs::Adjacent => (d / 2, d % 2 == 0, d ^ 1),
        };
        let (own, other) = (normed(i, h, first + d), normed(i, h, first + partner));
        let position = tables.positions[i] as usize;
        let (c, s) = (tables.cos.at(position, j), tables.sin.at(position, j));
        if real { own * c - other * s } else { own * c + other * s }
    })
}

/// [`Rope::rms_norm_rope`] of whole heads and of a part, of both kinds of pairs, and its backward pass, which adds to the weight's
/// gradient.
pub fn norm_rope<T: Float, D: Rope<T> + Norm<T> + Rows<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(67);
    // (rows, heads, head_dim, first rotated element, rotated elements, positions)
    for (n, heads, head_dim, first, dim, table) in [
        (0, 2, 4, 0, 4, 3),
        (5, 1, 2, 0, 2, 9),
        (4, 2, 9, 2, 6, 5),
        (3, 3, 64, 0, 64, 8),
        (2, 5, 128, 0, 128, 3),
        (41, 3, 64, 0, 64, 33),
        (300, 2, 20, 4, 16, 20),
    ] {
        for pairs in [RotaryPairs::Halves, RotaryPairs::Adjacent] {
            let what = format!("{n} rows, {heads} heads of {head_dim}, {dim} from {first} on in {pairs:?}");
            let (width, head) = (heads * head_dim, RotaryHead { head_dim, first, pairs });
            let angle = |p: usize, j: usize| p as f64 * 10_000f64.powf(-2.0 * j as f64 / dim as f64);
            let tables = Tables {
                cos: Matrix::from_fn(table, dim / 2, |p, j| T::Acc::from_f64(angle(p, j).cos()).to_f64()),
                sin: Matrix::from_fn(table, dim / 2, |p, j| T::Acc::from_f64(angle(p, j).sin()).to_f64()),
                positions: random.ints(n, table),
            };
            let (x, w) = (random.matrix::<T>(n, width), random.matrix::<T>(1, head_dim));
            let (px, pw) = (place::<T, D>(device, &x), place::<T, D>(device, &w));
            let (cos, sin) =
                (place::<T::Acc, D>(device, &tables.cos), place::<T::Acc, D>(device, &tables.sin));
            let positions = place_ints(device, 1, n, &tables.positions);
            let (mut y, mut r) =
                (output::<T, D>(device, n, width), output::<T::Acc, D>(device, 1, n * heads));
            let run = |y: &mut Placed<T, D>, r: &mut Placed<T::Acc, D>, positions: &Placed<i32, D>| {
                let (x, w, cos, sin) = (px.view(), pw.view(), cos.view(), sin.view());
                device.rms_norm_rope(y.view_mut(), r.view_mut(), x, w, cos, sin, positions.view(), head, EPS)
            };
            run(&mut y, &mut r, &positions).expect("rms_norm_rope");
            assert_close(&format!("y {what}"), &y.read(), &forward(&x, &w, &tables, head), tolerance);
            assert_close(&format!("rstd {what}"), &r.read(), &rstd(&x, head_dim), tolerance);
            assert_refused("rstd", run(&mut y, &mut output(device, 1, n * heads + 1), &positions));
            let outside = place_ints(device, 1, n, &vec![table as i32; n]);
            if n > 0 {
                assert_data_refused(device, "a position outside", run(&mut y, &mut r, &outside));
                run(&mut y, &mut r, &positions).expect("rms_norm_rope");
            }

            if n * width > 1500 {
                continue;
            }
            let (dy, dw) = (random.matrix::<T>(n, width), random.matrix::<T::Acc>(1, head_dim));
            let pdy = place::<T, D>(device, &dy);
            let back = |dx: &mut Placed<T, D>, dw: &mut Placed<T::Acc, D>, positions: &Placed<i32, D>| {
                let (dx, dw, dy, x, w) = (dx.view_mut(), dw.view_mut(), pdy.view(), px.view(), pw.view());
                let (r, cos, sin, positions) = (r.view(), cos.view(), sin.view(), positions.view());
                device.rms_norm_rope_backward(dx, dw, dy, x, w, r, cos, sin, positions, head)
            };
            let (mut dx, mut pdw) = (output::<T, D>(device, n, width), place::<T::Acc, D>(device, &dw));
            back(&mut dx, &mut pdw, &positions).expect("rms_norm_rope_backward");
            let tolerance = 10.0 * tolerance.max(GRADIENT);
            let want = gradient(&x, |x| forward(x, &w, &tables, head).dot(&dy));
            assert_close(&format!("dx {what}"), &dx.read(), &want, tolerance);
            let want = dw.plus(&gradient(&w, |w| forward(&x, w, &tables, head).dot(&dy)));
            assert_close(&format!("dw {what}"), &pdw.read(), &want, tolerance);
            assert_refused("dw", back(&mut dx, &mut output(device, 1, head_dim + 1), &positions));
            if n > 0 {
                assert_data_refused(device, "a position outside", back(&mut dx, &mut pdw, &outside));
            }
        }
    }
}
