//! Grouped matrix products.

use super::host::{Matrix, Random, assert_close, assert_data_refused, output, place, place_ints};
use crate::Float;
use crate::family::{GroupedGemm, Op};

/// [`GroupedGemm`] with empty groups, all rows in one group, large groups, rows that belong to none.
pub fn grouped_gemm<T: Float, D: GroupedGemm<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(5);
    let cases: [(&[usize], usize, usize, usize); 6] = [
        (&[3, 0, 5, 1], 2, 7, 5),
        (&[0, 0, 9, 0], 0, 4, 6),
        (&[0, 0], 3, 4, 3),
        (&[13], 0, 1, 17),
        (&[300, 2, 0, 517], 4, 9, 11),
        (&[6, 7], 1, 300, 3),
    ];
    for (counts, tail, out, input) in cases {
        let what = format!("{counts:?}, {tail} rows more, {input} → {out}");
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
        let x = random.matrix::<T>(n, input);
        let dy = random.matrix::<T>(n, out);
        let w = random.matrix::<T>(e * out, input);
        let (px, pdy) = (place::<T, D>(device, &hide(&x)), place::<T, D>(device, &hide(&dy)));
        let pw = place::<T, D>(device, &w);

        // Nor written: they keep what was there.
        let before = random.matrix::<T>(n, out);
        let mut y = place::<T, D>(device, &before);
        device.grouped_gemm(y.view_mut(), px.view(), pw.view(), Op::T, po.view()).expect("grouped_gemm");
        let want = Matrix::from_fn(n, out, |i, o| {
            group(i).map_or(before.at(i, o), |g| (0..input).map(|c| x.at(i, c) * w.at(g * out + o, c)).sum())
        });
        assert_close(&format!("grouped_gemm {what}"), &y.read(), &want, tolerance);

        let before = random.matrix::<T>(n, input);
        let mut dx = place::<T, D>(device, &before);
        device.grouped_gemm(dx.view_mut(), pdy.view(), pw.view(), Op::N, po.view()).expect("grouped_gemm");
        let want = Matrix::from_fn(n, input, |i, c| {
            group(i).map_or(before.at(i, c), |g| (0..out).map(|o| dy.at(i, o) * w.at(g * out + o, c)).sum())
        });
        assert_close(&format!("input gradient {what}"), &dx.read(), &want, tolerance);

        let product = Matrix::from_fn(e * out, input, |r, c| {
            let mine = (0..n).filter(|&i| group(i) == Some(r / out));
            mine.map(|i| dy.at(i, r % out) * x.at(i, c)).sum::<f64>()
        });
        let mut first = output::<T::Acc, D>(device, e * out, input);
        device
            .grouped_gemm_to_acc(first.view_mut(), pdy.view(), px.view(), po.view())
            .expect("grouped_gemm_to_acc");
        assert_close(&format!("grouped_gemm_to_acc {what}"), &first.read(), &product, tolerance);

        let g = random.matrix::<T::Acc>(e * out, input);
        let mut pg = place::<T::Acc, D>(device, &g);
        device.grouped_gemm_acc(pg.view_mut(), pdy.view(), px.view(), po.view()).expect("grouped_gemm_acc");
        assert_close(&format!("grouped_gemm_acc {what}"), &pg.read(), &g.plus(&product), tolerance);

        let mut refuse = |why: &str, offsets: &[i32]| {
            let po = place_ints(device, 1, offsets.len(), offsets);
            assert_data_refused(
                device,
                why,
                device.grouped_gemm(y.view_mut(), px.view(), pw.view(), Op::T, po.view()),
            );
            let mut g = output::<T::Acc, D>(device, e * out, input);
            assert_data_refused(
                device,
                why,
                device.grouped_gemm_acc(g.view_mut(), pdy.view(), px.view(), po.view()),
            );
            assert_data_refused(
                device,
                why,
                device.grouped_gemm_to_acc(g.view_mut(), pdy.view(), px.view(), po.view()),
            );
        };
        refuse("one group more than weights", &[&offsets[..], &[n as i32]].concat());
        refuse("no offsets", &[]);
        let mut wrong = offsets.clone();
        wrong[e] = n as i32 + 1;
        refuse("offsets past the rows", &wrong);
        wrong = offsets.clone();
        wrong[0] = 1;
        refuse("offsets that do not begin at 0", &wrong);
        if e > 1 {
            wrong = offsets.clone();
            wrong[1] = offsets[2] + 1;
            refuse("offsets that descend", &wrong);
        }
    }
}
