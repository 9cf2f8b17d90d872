//! Arithmetic on whole matrices.

use super::host::{
    Matrix, Random, assert_close, assert_data_refused, assert_refused, output, place, place_ints,
};
use crate::Float;
use crate::family::{ColumnBlocks, Elementwise};

/// [`Elementwise`], also for more elements than one piece of work.
pub fn elementwise<T: Float, D: Elementwise<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(3);
    for (rows, cols) in [(0, 5), (1, 1), (7, 13), (300, 131)] {
        let (a, b) = (random.matrix::<T>(rows, cols), random.matrix::<T>(rows, cols));
        let (pa, pb) = (place::<T, D>(device, &a), place::<T, D>(device, &b));

        let mut y = output::<T, D>(device, rows, cols);
        device.add(y.view_mut(), pa.view(), pb.view()).expect("add");
        assert_close("add", &y.read(), &a.plus(&b), tolerance);

        let mut y = place::<T, D>(device, &a);
        device.add_assign(y.view_mut(), pb.view()).expect("add_assign");
        assert_close("add_assign", &y.read(), &a.plus(&b), tolerance);

        let row = random.matrix::<T>(1, cols);
        let prow = place::<T, D>(device, &row);
        let mut y = place::<T, D>(device, &a);
        device.add_row(y.view_mut(), prow.view()).expect("add_row");
        let want = Matrix::from_fn(rows, cols, |i, c| a.at(i, c) + row.at(0, c));
        assert_close("add_row", &y.read(), &want, tolerance);
        if rows != 1 {
            assert_refused("row", device.add_row(y.view_mut(), pb.view()));
        }

        let mut wide = output::<T::Acc, D>(device, rows, cols);
        device.widen(wide.view_mut(), pa.view()).expect("widen");
        assert_close("widen", &wide.read(), &a, 0.0);
        let mut narrow = output::<T, D>(device, rows, cols);
        device.narrow(narrow.view_mut(), wide.view()).expect("narrow");
        assert_close("narrow", &narrow.read(), &a, 0.0);

        let mut double = output::<f64, D>(device, rows, cols);
        device.widen_f64(double.view_mut(), pa.view()).expect("widen_f64");
        assert_close("widen_f64", &double.read(), &a, 0.0);
        let mut back = output::<T, D>(device, rows, cols);
        device.narrow_f64(back.view_mut(), double.view()).expect("narrow_f64");
        assert_close("narrow_f64", &back.read(), &a, 0.0);
        // Between two numbers of `T` or, in double precision, one of them.
        let thirds = Matrix::from_fn(rows, cols, |i, c| (a.at(i, c) + 1.0) / 3.0);
        device.narrow_f64(back.view_mut(), place::<f64, D>(device, &thirds).view()).expect("narrow_f64");
        let rounded = Matrix::from_fn(rows, cols, |i, c| T::from_f64(thirds.at(i, c)).to_f64());
        assert_close("narrow_f64", &back.read(), &rounded, 0.0);

        let mut other = output::<T, D>(device, rows + 1, cols);
        assert_refused("narrow_f64", device.narrow_f64(other.view_mut(), double.view()));
        assert_refused("widen_f64", device.widen_f64(double.view_mut(), other.view()));
        assert_refused("add", device.add(other.view_mut(), pa.view(), pb.view()));
        assert_refused("add_assign", device.add_assign(other.view_mut(), pa.view()));
        assert_refused("narrow", device.narrow(other.view_mut(), wide.view()));
    }

    for (n, from, cols, k) in [(9, 5, 7, 1), (9, 5, 7, 2), (301, 40, 67, 3), (3, 0, 2, 2), (4, 3, 2, 0)] {
        let x = random.matrix::<T>(from, cols);
        let mut index = random.ints(n * k, from.max(1));
        // Rows with one, and with no source.
        for (i, at) in index.iter_mut().enumerate() {
            if from == 0 || i % 5 == 1 || i / k.max(1) == 2 {
                *at = -1;
            }
        }
        let want = Matrix::from_fn(n, cols, |i, c| {
            index[i * k..(i + 1) * k].iter().filter(|&&s| s >= 0).map(|&s| x.at(s as usize, c)).sum()
        });
        let (px, pi) = (place::<T, D>(device, &x), place_ints(device, n, k, &index));
        let mut y = output::<T, D>(device, n, cols);
        device.gather_sum(y.view_mut(), px.view(), pi.view()).expect("gather_sum");
        assert_close("gather_sum", &y.read(), &want, tolerance);
        if k > 0 {
            let outside = place_ints(device, n, k, &vec![from as i32; n * k]);
            assert_data_refused(
                device,
                "an index past the end",
                device.gather_sum(y.view_mut(), px.view(), outside.view()),
            );
        }
    }

    for (n, cols, width, count, first, step) in [
        (5, 20, 3, 4, 2, 5),
        (301, 9, 2, 7, 1, 1),
        (3, 4, 4, 1, 0, 0),
        (2, 3, 2, 0, 0, 1),
        (0, 3, 1, 3, 0, 1),
    ] {
        let x = random.matrix::<T>(n, cols);
        let (px, at) = (place::<T, D>(device, &x), ColumnBlocks { first, step });
        let mut y = output::<T, D>(device, n, width);
        device.sum_column_blocks(y.view_mut(), px.view(), at, count).expect("sum_column_blocks");
        let want =
            Matrix::from_fn(n, width, |i, j| (0..count).map(|b| x.at(i, first + b * step + j)).sum::<f64>());
        assert_close("sum_column_blocks", &y.read(), &want, tolerance);
        let beyond = ColumnBlocks { first: cols, step };
        assert_refused("blocks beyond x", device.sum_column_blocks(y.view_mut(), px.view(), beyond, 1));
        let mut other = output::<T, D>(device, n + 1, width);
        assert_refused("other rows", device.sum_column_blocks(other.view_mut(), px.view(), at, count));
    }
}
