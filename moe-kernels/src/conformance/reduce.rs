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
    sums_of_squares::<T, D>(device);
    // Small terms beside a large one survive only in f64.
    let a = Matrix::from_fn(1, 4097, |_, i| if i == 0 { 1.0 } else { 2f64.powi(-15) });
    let pa = place::<T, D>(device, &a);
    let mut out = place::<f64, D>(device, &Matrix::row(&[0.0]));
    device.dot(out.view_mut(), pa.view(), pa.view()).expect("dot");
    assert_close("dot in f64", &out.read(), &Matrix::row(&[1.0 + 2f64.powi(-18)]), 1e-15);
}

/// Pieces of all lengths, some of one sum, in any order.
fn sums_of_squares<T: Float, D: Reduce<T>>(device: &D) {
    let mut random = Random::new(13);
    let sizes = [(4, 50_001), (0, 1), (4, 7), (2, 40_960), (0, 4099), (2, 0), (4, 64), (5, 20_480)];
    let pieces: Vec<_> = sizes.map(|(i, n)| (i, random.matrix::<T>(1, n))).into();
    let mut want = vec![0.25; 6];
    pieces.iter().for_each(|(i, x)| want[*i] += x.dot(x));
    let placed: Vec<_> = pieces.iter().map(|(i, x)| (*i, place::<T, D>(device, x))).collect();
    let views: Vec<_> = placed.iter().map(|(i, x)| (*i, x.view())).collect();
    let sums = || {
        let mut out = place::<f64, D>(device, &Matrix::row(&[0.25; 6]));
        device.sums_of_squares(out.view_mut(), &views).expect("sums_of_squares");
        out.read()
    };
    let first = sums();
    assert_close("sums of squares", &first, &Matrix::row(&want), 1e-11);
    assert_eq!(first, sums(), "sums of squares twice");

    let mut out = place::<f64, D>(device, &Matrix::row(&[0.25; 5]));
    device.sums_of_squares(out.view_mut(), &[]).expect("sums of nothing");
    assert_close("sums of nothing", &out.read(), &Matrix::row(&[0.25; 5]), 0.0);
    assert!(device.sums_of_squares(out.view_mut(), &views).is_err(), "a sum past the end must be refused");
    let square = place::<T, D>(device, &random.matrix::<T>(2, 3));
    assert_refused("a piece of two rows", device.sums_of_squares(out.view_mut(), &[(0, square.view())]));
}
