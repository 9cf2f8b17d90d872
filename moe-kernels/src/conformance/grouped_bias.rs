//! A vector for each of consecutive row groups.

use super::GRADIENT;
use super::host::{
    Matrix, Random, assert_close, assert_data_refused, assert_refused, gradient, output, place, place_ints,
};
use crate::Float;
use crate::family::GroupedBias;

/// [`GroupedBias`] with and without factors, with empty groups, groups beyond a piece of work, rows that belong to none;
/// gradients against differences.
pub fn grouped_bias<T: Float, D: GroupedBias<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(21);
    let cases: [(&[usize], usize, usize); 5] = [
        (&[3, 0, 5, 1], 2, 7),
        (&[0, 0, 4], 0, 1),
        (&[0, 0], 3, 4),
        (&[1000, 2, 0, 517], 4, 67),
        (&[4], 0, 300),
    ];
    for (counts, tail, cols) in cases {
        let e = counts.len();
        let mut offsets = vec![0];
        for c in counts {
            offsets.push(offsets[offsets.len() - 1] + *c as i32);
        }
        let n = offsets[e] as usize + tail;
        let group = |i: usize| (0..e).find(|&g| (offsets[g]..offsets[g + 1]).contains(&(i as i32)));
        let po = place_ints(device, 1, e + 1, &offsets);
        // Rows of no group must not be read: they are NaN here.
        let hide = |m: &Matrix| {
            Matrix::from_fn(m.rows, m.cols, |i, j| if group(i).is_some() { m.at(i, j) } else { f64::NAN })
        };
        let (bias, dy, factors) =
            (random.matrix::<T>(e, cols), random.matrix::<T>(n, cols), random.matrix::<T::Acc>(1, n));
        let (pb, pdy, ps) = (
            place::<T, D>(device, &bias),
            place::<T, D>(device, &hide(&dy)),
            place::<T::Acc, D>(device, &factors),
        );
        for scaled in [false, true] {
            let what = format!("{counts:?}, {tail} rows more, {cols} columns, scaled {scaled}");
            let factor = |factors: &Matrix, i| if scaled { factors.at(0, i) } else { 1.0 };
            let scale = || scaled.then(|| ps.view());
            let add = |bias: &Matrix, factors: &Matrix, i, c| {
                group(i).map_or(0.0, |g| factor(factors, i) * bias.at(g, c))
            };
            let before = random.matrix::<T>(n, cols);
            let mut y = place::<T, D>(device, &before);
            device.grouped_add_bias(y.view_mut(), pb.view(), scale(), po.view()).expect("grouped_add_bias");
            let want = Matrix::from_fn(n, cols, |i, c| before.at(i, c) + add(&bias, &factors, i, c));
            assert_close(&format!("grouped_add_bias {what}"), &y.read(), &want, tolerance);

            // The sum of all outputs times dy, by bias and by factors.
            let objective = |bias: &Matrix, factors: &Matrix| {
                Matrix::from_fn(n, cols, |i, c| add(bias, factors, i, c)).dot(&dy)
            };
            let (g, d_factors) = (random.matrix::<T::Acc>(e, cols), random.matrix::<T::Acc>(1, n));
            let mut pg = place::<T::Acc, D>(device, &g);
            device.grouped_bias_acc(pg.view_mut(), pdy.view(), scale(), po.view()).expect("grouped_bias_acc");
            let mut pd = place::<T::Acc, D>(device, &d_factors);
            device
                .grouped_bias_scale_acc(pd.view_mut(), pdy.view(), pb.view(), po.view())
                .expect("grouped_bias_scale_acc");
            // Differences where they are affordable; linear in the bias and in the factors, so by formula elsewhere.
            let affordable = n * cols < 100;
            let d_bias = if affordable {
                gradient(&bias, |bias| objective(bias, &factors))
            } else {
                Matrix::from_fn(e, cols, |g, c| {
                    (0..n).filter(|&i| group(i) == Some(g)).map(|i| factor(&factors, i) * dy.at(i, c)).sum()
                })
            };
            let tolerance = if affordable { tolerance.max(GRADIENT) } else { tolerance };
            assert_close(&format!("grouped_bias_acc {what}"), &pg.read(), &g.plus(&d_bias), 4.0 * tolerance);
            let by_factor = if scaled && affordable {
                gradient(&factors, |factors| objective(&bias, factors))
            } else {
                Matrix::from_fn(1, n, |_, i| {
                    group(i).map_or(0.0, |g| (0..cols).map(|c| dy.at(i, c) * bias.at(g, c)).sum())
                })
            };
            let want = d_factors.plus(&by_factor);
            assert_close(&format!("grouped_bias_scale_acc {what}"), &pd.read(), &want, 4.0 * tolerance);
        }

        let mut y = output::<T, D>(device, n, cols);
        let long = place::<T::Acc, D>(device, &random.matrix::<T::Acc>(1, n + 1));
        let mut attempt = |what, bias: &Matrix, scale, offsets: &[i32]| {
            let (pb, po) = (place::<T, D>(device, bias), place_ints(device, 1, offsets.len(), offsets));
            assert_data_refused(
                device,
                what,
                device.grouped_add_bias(y.view_mut(), pb.view(), scale, po.view()),
            );
        };
        attempt("a factor too many", &bias, Some(long.view()), &offsets);
        attempt("a bias too many", &random.matrix::<T>(e + 1, cols), None, &offsets);
        attempt("offsets past the rows", &bias, None, &[&offsets[..e], &[n as i32 + 1]].concat());
        let mut other = output::<T::Acc, D>(device, e + 1, cols);
        assert_refused("g", device.grouped_bias_acc(other.view_mut(), pdy.view(), None, po.view()));
        let mut other = output::<T::Acc, D>(device, 1, n + 1);
        let refused = device.grouped_bias_scale_acc(other.view_mut(), pdy.view(), pb.view(), po.view());
        assert_refused("d_scale", refused);
    }
}
