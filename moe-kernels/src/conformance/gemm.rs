//! Dense matrix products.

use super::host::{Random, assert_close, assert_refused, output, place};
use crate::Float;
use crate::family::{Gemm, Op};

/// [`Gemm`] in all four transpositions, at sizes from nothing to several tiles.
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
            let stored = |m: &super::host::Matrix, op| if op == Op::T { m.transposed() } else { m.clone() };
            let (pa, pb) = (place::<T, D>(device, &stored(&a, ta)), place::<T, D>(device, &stored(&b, tb)));

            let mut y = output::<T, D>(device, m, n);
            device.gemm(y.view_mut(), pa.view(), ta, pb.view(), tb).expect("gemm");
            assert_close(&format!("gemm {what}"), &y.read(), &product, tolerance);

            let g = random.matrix::<T::Acc>(m, n);
            let mut pg = place::<T::Acc, D>(device, &g);
            device.gemm_acc(pg.view_mut(), pa.view(), ta, pb.view(), tb).expect("gemm_acc");
            assert_close(&format!("gemm_acc {what}"), &pg.read(), &g.plus(&product), tolerance);

            let mut wrong = output::<T, D>(device, m + 1, n);
            assert_refused(&what, device.gemm(wrong.view_mut(), pa.view(), ta, pb.view(), tb));
            let mut wrong = output::<T::Acc, D>(device, m, n + 1);
            assert_refused(&what, device.gemm_acc(wrong.view_mut(), pa.view(), ta, pb.view(), tb));
        }
    }
    let (a, b) = (random.matrix::<T>(2, 3), random.matrix::<T>(4, 5));
    let (a, b) = (place::<T, D>(device, &a), place::<T, D>(device, &b));
    let mut y = output::<T, D>(device, 2, 5);
    assert_refused("3 columns by 4 rows", device.gemm(y.view_mut(), a.view(), Op::N, b.view(), Op::N));
}
