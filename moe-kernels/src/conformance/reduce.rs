//! Sums.

use super::host::{Matrix, Random, assert_close, assert_refused, output, place};
use crate::Float;
use crate::family::Reduce;

/// [`Reduce`], over matrices of one row, of many, and of none.
pub fn reduce<T: Float, D: Reduce<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(12);
    for (rows, cols) in [(0, 3), (3, 0), (1, 1), (1, 50_001), (7, 13), (400, 131), (2000, 1)] {
        let (a, b) = (random.matrix::<T>(rows, cols), random.matrix::<T>(rows, cols));
        let (pa, pb) = (place::<T, D>(device, &a), place::<T, D>(device, &b));
        for (what, pb, b) in [("dot", &pb, &b), ("squares", &pa, &a)] {
            let mut out = place::<f64, D>(device, &Matrix::row(&[0.25]));
            device.dot(out.view_mut(), pa.view(), pb.view()).expect("dot");
            // In f64 whatever the type: the elements are exact.
            assert_close(
                &format!("{what} {rows}×{cols}"),
                &out.read(),
                &Matrix::row(&[0.25 + a.dot(b)]),
                1e-11,
            );
        }
        let mut sums = output::<T::Acc, D>(device, 1, cols);
        device.column_sums(sums.view_mut(), pa.view()).expect("column_sums");
        let want = Matrix::from_fn(1, cols, |_, c| (0..rows).map(|i| a.at(i, c)).sum());
        assert_close(&format!("column_sums {rows}×{cols}"), &sums.read(), &want, 10.0 * tolerance);

        let other = place::<T, D>(device, &random.matrix::<T>(rows + 1, cols));
        let mut out = output::<f64, D>(device, 1, 1);
        assert_refused("b", device.dot(out.view_mut(), pa.view(), other.view()));
        let mut wrong = output::<T::Acc, D>(device, 1, cols + 1);
        assert_refused("out", device.column_sums(wrong.view_mut(), pa.view()));
    }
    // Small terms beside a large one survive only in f64.
    let a = Matrix::from_fn(1, 4097, |_, i| if i == 0 { 1.0 } else { 2f64.powi(-15) });
    let pa = place::<T, D>(device, &a);
    let mut out = place::<f64, D>(device, &Matrix::row(&[0.0]));
    device.dot(out.view_mut(), pa.view(), pa.view()).expect("dot");
    assert_close("dot in f64", &out.read(), &Matrix::row(&[1.0 + 2f64.powi(-18)]), 1e-15);
}
