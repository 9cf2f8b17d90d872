//! Dense matrix products.

use super::host::{Matrix, Random, assert_close, assert_refused, output, place};
use crate::family::{Gemm, Op};
use crate::{Float, View, ViewMut};

/// [`Gemm`] in all four transpositions, at sizes from nothing to several tiles; backward with gradients that are not rounded.
pub fn gemm<T: Float, D: Gemm<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(4);
    let sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (17, 33, 65),
        (64, 64, 64),
        (130, 9, 31),
        (5, 0, 3),
        (0, 4, 3),
        (4, 3, 0),
        (517, 23, 11),
        (19, 523, 6),
        (300, 520, 70),
        (128, 192, 64),
    ];
    for (m, n, k) in sizes {
        for (ta, tb) in [(Op::N, Op::N), (Op::N, Op::T), (Op::T, Op::N), (Op::T, Op::T)] {
            let what = format!("{m}×{n}×{k} {ta:?}{tb:?}");
            let (a, b) = (random.matrix::<T>(m, k), random.matrix::<T>(k, n));
            let product = a.times(&b);
            let stored = |m: &Matrix, op| if op == Op::T { m.transposed() } else { m.clone() };
            let (pa, pb) = (place::<T, D>(device, &stored(&a, ta)), place::<T, D>(device, &stored(&b, tb)));

            let mut y = output::<T, D>(device, m, n);
            device.gemm(y.view_mut(), pa.view(), ta, pb.view(), tb).expect("gemm");
            assert_close(&format!("gemm {what}"), &y.read(), &product, tolerance);

            let mut first = output::<T::Acc, D>(device, m, n);
            device.gemm_to_acc(first.view_mut(), pa.view(), ta, pb.view(), tb).expect("gemm_to_acc");
            assert_close(&format!("gemm_to_acc {what}"), &first.read(), &product, tolerance);

            let g = random.matrix::<T::Acc>(m, n);
            let mut pg = place::<T::Acc, D>(device, &g);
            device.gemm_acc(pg.view_mut(), pa.view(), ta, pb.view(), tb).expect("gemm_acc");
            assert_close(&format!("gemm_acc {what}"), &pg.read(), &g.plus(&product), tolerance);

            let mut wrong = output::<T, D>(device, m + 1, n);
            assert_refused(&what, device.gemm(wrong.view_mut(), pa.view(), ta, pb.view(), tb));
            let mut wrong = output::<T::Acc, D>(device, m, n + 1);
            assert_refused(&what, device.gemm_acc(wrong.view_mut(), pa.view(), ta, pb.view(), tb));
            assert_refused(&what, device.gemm_to_acc(wrong.view_mut(), pa.view(), ta, pb.view(), tb));
        }
    }
    for (m, n, k) in
        [(0, 4, 3), (3, 0, 2), (3, 4, 0), (1, 1, 1), (37, 5, 6), (300, 64, 8), (129, 192, 60), (64, 70, 128)]
    {
        // Of every size, so that those that rounding to `T` would lose count.
        let dy = random.matrix::<T::Acc>(m, k);
        let dy = Matrix::from_fn(m, k, |i, j| dy.at(i, j) * if i % 3 == 0 { 1e-3 } else { 1.0 });
        let dy = Matrix { data: dy.data.iter().map(|&x| T::Acc::from_f64(x).to_f64()).collect(), ..dy };
        let (x, w) = (random.matrix::<T>(m, n), random.matrix::<T>(k, n));
        let (dx, dw) = (random.matrix::<T>(m, n), random.matrix::<T::Acc>(k, n));
        let (px, pw, pdy) =
            (place::<T, D>(device, &x), place::<T, D>(device, &w), place::<T::Acc, D>(device, &dy));
        let (mut pdx, mut pdw) = (place::<T, D>(device, &dx), place::<T::Acc, D>(device, &dw));
        let run = |dx: ViewMut<'_, T, D>, dw: ViewMut<'_, T::Acc, D>, w: View<'_, T, D>| {
            device.gemm_backward(dx, dw, pdy.view(), px.view(), w)
        };
        run(pdx.view_mut(), pdw.view_mut(), pw.view()).expect("gemm_backward");
        let what = format!("gemm_backward {m}×{n}×{k}");
        assert_close(&format!("dx of {what}"), &pdx.read(), &dx.plus(&dy.times(&w)), tolerance);
        // In the accumulation type whatever `T` is, as its operands are exact.
        let exact = if T::is_acc() { tolerance } else { 1e-5 };
        assert_close(&format!("dw of {what}"), &pdw.read(), &dw.plus(&dy.transposed().times(&x)), exact);

        let mut wrong = output::<T, D>(device, m + 1, n);
        assert_refused(&what, run(wrong.view_mut(), pdw.view_mut(), pw.view()));
        let mut wrong = output::<T::Acc, D>(device, k, n + 1);
        assert_refused(&what, run(pdx.view_mut(), wrong.view_mut(), pw.view()));
        let wrong = output::<T, D>(device, k + 1, n);
        assert_refused(&what, run(pdx.view_mut(), pdw.view_mut(), wrong.view()));
    }
    let (a, b) = (random.matrix::<T>(2, 3), random.matrix::<T>(4, 5));
    let (a, b) = (place::<T, D>(device, &a), place::<T, D>(device, &b));
    let mut y = output::<T, D>(device, 2, 5);
    assert_refused("3 columns by 4 rows", device.gemm(y.view_mut(), a.view(), Op::N, b.view(), Op::N));
}
