//! Products of row groups with a gated activation.

use super::GRADIENT;
use super::activation::of_gate;
use super::host::{
    Matrix, Random, assert_close, assert_data_refused, assert_refused, gradient, output, place, place_ints,
};
use crate::Float;
use crate::family::{Gate, GateFunction, GateGradients, GroupedGlu};

/// [`GroupedGlu`] with and without probabilities, with empty groups, all rows in one group, rows that belong to none.
pub fn grouped_glu<T: Float, D: GroupedGlu<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(31);
    let cases: [(&[usize], usize, usize, usize); 7] = [
        (&[3, 0, 5, 1], 2, 5, 7),
        (&[0, 0, 9, 0], 0, 6, 4),
        (&[0, 0], 3, 4, 3),
        (&[13], 0, 17, 1),
        (&[6, 7], 1, 9, 100),
        // Whole vectors: kernels that need them are tested here.
        (&[130, 0, 2, 70], 4, 64, 64),
        (&[0, 150], 1, 128, 384),
    ];
    for (i, (counts, tail, hidden, inner)) in cases.into_iter().enumerate() {
        let function = [GateFunction::Silu, GateFunction::GeluTanh][i % 2];
        for (function, with_p) in [(function, true), (GateFunction::default(), false)] {
            case::<T, D>(device, tolerance, &mut random, counts, tail, [hidden, inner], function, with_p);
        }
    }
}

#[allow(clippy::too_many_arguments)] // one line for each call, all of them sizes
fn case<T: Float, D: GroupedGlu<T>>(
    device: &D,
    tolerance: f64,
    random: &mut Random,
    counts: &[usize],
    tail: usize,
    [hidden, inner]: [usize; 2],
    function: GateFunction,
    with_p: bool,
) {
    let what = format!("{counts:?}, {tail} rows more, {hidden} → {inner}, {function:?}, p {with_p}");
    let e = counts.len();
    let mut offsets = vec![0];
    for c in counts {
        offsets.push(offsets[offsets.len() - 1] + *c as i32);
    }
    let end = offsets[e] as usize;
    let n = end + tail;
    let group = |i: usize| (0..e).find(|&g| (offsets[g]..offsets[g + 1]).contains(&(i as i32)));
    let po = place_ints(device, 1, e + 1, &offsets);
    // Rows of no group are NaN, and of the results anything.
    let hide =
        |m: &Matrix| Matrix::from_fn(m.rows, m.cols, |i, j| if i < end { m.at(i, j) } else { f64::NAN });
    let of_groups = |m: &Matrix| Matrix::from_fn(end, m.cols, |i, j| m.at(i, j));
    let scale = (hidden as f64).powf(-0.5);
    let weights =
        |m: Matrix| Matrix::from_fn(m.rows, m.cols, |i, j| T::from_f64(2.0 * scale * m.at(i, j)).to_f64());
    let (x, dy) = (random.matrix::<T>(n, hidden), random.matrix::<T>(n, hidden));
    let w_in = weights(random.matrix::<T>(e * 2 * inner, hidden));
    let w_out = weights(random.matrix::<T>(e * hidden, inner));
    let p = random.matrix::<T::Acc>(1, n);
    let factor = |i: usize| if with_p { p.at(0, i) } else { 1.0 };
    let (px, pdy) = (place::<T, D>(device, &hide(&x)), place::<T, D>(device, &hide(&dy)));
    let (pw_in, pw_out) = (place::<T, D>(device, &w_in), place::<T, D>(device, &w_out));
    let pp = place::<T::Acc, D>(device, &p);
    let gate = Gate { function, p: with_p.then(|| pp.view()) };

    let (mut gate_up, mut y) = (output::<T, D>(device, n, 2 * inner), output::<T, D>(device, n, inner));
    device
        .grouped_gemm_glu(gate_up.view_mut(), y.view_mut(), px.view(), pw_in.view(), &gate, po.view())
        .expect("grouped_gemm_glu");
    let want = Matrix::from_fn(end, 2 * inner, |i, c| {
        let row = group(i).map_or(0, |g| g * 2 * inner + c);
        (0..hidden).map(|k| x.at(i, k) * w_in.at(row, k)).sum()
    });
    assert_close(&format!("gate and up {what}"), &of_groups(&gate_up.read()), &want, tolerance);
    let want = Matrix::from_fn(end, inner, |i, c| {
        of_gate(function, want.at(i, c)) * want.at(i, inner + c) * factor(i)
    });
    assert_close(&format!("activated {what}"), &of_groups(&y.read()), &want, 2.0 * tolerance);

    // Of gates and ups that are given, so that rounding of the product before is no part of the error.
    let given = random.matrix::<T>(n, 2 * inner);
    let p_given = place::<T, D>(device, &hide(&given));
    let d = Matrix::from_fn(end, inner, |i, c| {
        let first = group(i).map_or(0, |g| g * hidden);
        (0..hidden).map(|k| dy.at(i, k) * w_out.at(first + k, c)).sum()
    });
    let slope = |g: f64| gradient(&Matrix::row(&[g]), |g| of_gate(function, g.at(0, 0))).at(0, 0);
    let want = Matrix::from_fn(end, 2 * inner, |i, c| {
        let (g, u) = (given.at(i, c % inner), given.at(i, inner + c % inner));
        d.at(i, c % inner) * factor(i) * if c < inner { slope(g) * u } else { of_gate(function, g) }
    });
    let want_dp = Matrix::from_fn(1, end, |_, i| {
        (0..inner).map(|c| d.at(i, c) * of_gate(function, given.at(i, c)) * given.at(i, inner + c)).sum()
    });
    let tolerance = 2.0 * tolerance.max(GRADIENT);
    for with_dp in [false, true] {
        let (mut dg, mut dp) = (output::<T, D>(device, n, 2 * inner), output::<T::Acc, D>(device, 1, n));
        let gradients = GateGradients { gate_up: dg.view_mut(), p: with_dp.then(|| dp.view_mut()) };
        device
            .grouped_gemm_glu_backward(gradients, pdy.view(), pw_out.view(), p_given.view(), &gate, po.view())
            .expect("grouped_gemm_glu_backward");
        assert_close(&format!("gradients {what}"), &of_groups(&dg.read()), &want, tolerance);
        if with_dp {
            let dp = dp.read();
            let dp = Matrix::from_fn(1, end, |_, i| dp.at(0, i));
            assert_close(&format!("gradient of p {what}"), &dp, &want_dp, tolerance);
        }
    }

    let mut wrong = output::<T, D>(device, n, inner + 1);
    let refused = device.grouped_gemm_glu(
        gate_up.view_mut(),
        wrong.view_mut(),
        px.view(),
        pw_in.view(),
        &gate,
        po.view(),
    );
    assert_refused("y", refused);
    let mut wrong = output::<T, D>(device, n, 2 * inner + 1);
    let gradients = GateGradients { gate_up: wrong.view_mut(), p: None };
    let (w, given) = (pw_out.view(), p_given.view());
    let refused = device.grouped_gemm_glu_backward(gradients, pdy.view(), w, given, &gate, po.view());
    assert_refused("gradients", refused);
    let mut past = offsets.clone();
    past[e] = n as i32 + 1;
    let past = place_ints(device, 1, e + 1, &past);
    let result = device.grouped_gemm_glu(
        gate_up.view_mut(),
        y.view_mut(),
        px.view(),
        pw_in.view(),
        &gate,
        past.view(),
    );
    assert_data_refused(device, "offsets past the rows", result);
    let mut dg = output::<T, D>(device, n, 2 * inner);
    let gradients = GateGradients { gate_up: dg.view_mut(), p: None };
    let result = device.grouped_gemm_glu_backward(gradients, pdy.view(), w, given, &gate, past.view());
    assert_data_refused(device, "offsets past the rows", result);
}
