//! Rotary position embedding.

use super::host::{
    Matrix, Random, assert_close, assert_data_refused, assert_refused, output, place, place_ints,
};
use crate::Float;
use crate::family::{Rope, RotaryHead, RotaryPairs, Rotation};

/// [`Rope`] against complex rotation, of both kinds of pairs, of whole heads and of a part; backward is the transpose, and
/// undoes forward.
pub fn rope<T: Float, D: Rope<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(7);
    // (rows, heads, head_dim, first rotated element, rotated elements, positions)
    for (n, heads, head_dim, first, dim, table) in [
        (0, 2, 4, 0, 4, 3),
        (5, 1, 2, 0, 2, 9),
        (7, 3, 6, 0, 6, 8),
        (4, 2, 9, 2, 6, 5),
        (3, 2, 5, 5, 0, 4),
        (9, 2, 64, 0, 64, 33),
        (9, 3, 50, 34, 16, 33),
        (300, 3, 20, 0, 20, 300),
    ] {
        for pairs in [RotaryPairs::Halves, RotaryPairs::Adjacent] {
            let what = format!("{n} rows, {heads} heads of {head_dim}, {dim} from {first} on in {pairs:?}");
            let (half, width) = (dim / 2, heads * head_dim);
            let head = RotaryHead { head_dim, first, pairs };
            let angle = |p: usize, j: usize| p as f64 * 10_000f64.powf(-(j as f64) / half as f64);
            let cos = Matrix::from_fn(table, half, |p, j| T::Acc::from_f64(angle(p, j).cos()).to_f64());
            let sin = Matrix::from_fn(table, half, |p, j| T::Acc::from_f64(angle(p, j).sin()).to_f64());
            let positions = random.ints(n, table);
            let x = random.matrix::<T>(n, width);
            let want = Matrix::from_fn(n, width, |i, c| {
                let (h, d) = (c / head_dim, c % head_dim);
                if !(first..first + dim).contains(&d) {
                    return x.at(i, c);
                }
                let (d, p, at) = (d - first, positions[i] as usize, h * head_dim + first);
                let (j, real, re, im) = match pairs {
                    RotaryPairs::Halves => (d % half, d < half, d % half, half + d % half),
                    RotaryPairs::Adjacent => (d / 2, d % 2 == 0, d - d % 2, d - d % 2 + 1),
                };
                let (re, im) = (x.at(i, at + re), x.at(i, at + im));
                let (c, s) = (cos.at(p, j), sin.at(p, j));
                if real { re * c - im * s } else { re * s + im * c }
            });
            let px = place::<T, D>(device, &x);
            let (pc, ps) = (place::<T::Acc, D>(device, &cos), place::<T::Acc, D>(device, &sin));
            let pp = place_ints(device, 1, n, &positions);
            let mut y = output::<T, D>(device, n, width);
            let rotate = |y: &mut super::host::Placed<T, D>, x: &super::host::Placed<T, D>, head, r| {
                device.rope(y.view_mut(), x.view(), pc.view(), ps.view(), pp.view(), head, r)
            };
            rotate(&mut y, &px, head, Rotation::Forward).expect("rope");
            assert_close(&format!("rope {what}"), &y.read(), &want, tolerance);

            let mut back = output::<T, D>(device, n, width);
            rotate(&mut back, &y, head, Rotation::Backward).expect("rope");
            assert_close(&format!("rope back {what}"), &back.read(), &x, 4.0 * tolerance);
            // ⟨R x, g⟩ = ⟨x, Rᵀ g⟩.
            let g = random.matrix::<T>(n, width);
            rotate(&mut back, &place(device, &g), head, Rotation::Backward).expect("rope");
            let (a, b) = (Matrix::row(&[y.read().dot(&g)]), Matrix::row(&[back.read().dot(&x)]));
            assert_close(&format!("transpose {what}"), &a, &b, tolerance * (1 + n * width) as f64);

            let mut attempt = |what, head| assert_refused(what, rotate(&mut y, &px, head, Rotation::Forward));
            attempt("head_dim 0", RotaryHead { head_dim: 0, ..head });
            attempt("heads that do not fit", RotaryHead { head_dim: width + 1, ..head });
            attempt("a part beyond the head", RotaryHead { first: head_dim - dim + 1, ..head });
            for wrong in [-1, table as i32].into_iter().filter(|_| n > 0) {
                let pp = place_ints(device, 1, n, &vec![wrong; n]);
                let refused = device.rope(
                    y.view_mut(),
                    px.view(),
                    pc.view(),
                    ps.view(),
                    pp.view(),
                    head,
                    Rotation::Forward,
                );
                assert_data_refused(device, "a position outside the tables", refused);
            }
        }
    }
}
