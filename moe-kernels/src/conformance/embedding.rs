//! Embedding lookup.

use super::host::{Matrix, Random, assert_close, assert_refused, output, place, place_ints};
use crate::Float;
use crate::family::Embedding;

/// [`Embedding`] of blocks of the vocabulary, an empty one among them, with repeated and foreign ids, with and without one that
/// gets no gradient.
pub fn embedding<T: Float, D: Embedding<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(9);
    for (n, h, first, rows, vocabulary) in
        [(13, 5, 0, 7, 7), (17, 3, 4, 5, 11), (6, 4, 9, 0, 9), (0, 2, 0, 3, 3), (400, 67, 50, 200, 300)]
    {
        let mut ids = random.ints(n, vocabulary);
        if n > 0 {
            ids[0] = -1;
        }
        let row = |i: usize| usize::try_from(ids[i]).ok()?.checked_sub(first).filter(|&r| r < rows);
        let table = random.matrix::<T>(rows, h);
        let (pt, pi) = (place::<T, D>(device, &table), place_ints(device, 1, n, &ids));
        let mut y = output::<T, D>(device, n, h);
        device.embed(y.view_mut(), pt.view(), pi.view(), first).expect("embed");
        let want = Matrix::from_fn(n, h, |i, c| row(i).map_or(0.0, |r| table.at(r, c)));
        assert_close("embed", &y.read(), &want, 0.0);

        let (dy, before) = (random.matrix::<T>(n, h), random.matrix::<T::Acc>(rows, h));
        let pdy = place::<T, D>(device, &dy);
        for padding in [None, Some(first + rows / 2), first.checked_sub(1), Some(first + rows)] {
            let mut dtable = place::<T::Acc, D>(device, &before);
            let backward = device.embed_backward(dtable.view_mut(), pdy.view(), pi.view(), first, padding);
            backward.expect("embed_backward");
            let want = Matrix::from_fn(rows, h, |r, c| {
                let of_row = |&i: &usize| row(i) == Some(r) && padding != Some(first + r);
                before.at(r, c) + (0..n).filter(of_row).map(|i| dy.at(i, c)).sum::<f64>()
            });
            assert_close("embed_backward", &dtable.read(), &want, tolerance);
        }

        let mut wrong = output::<T, D>(device, n, h + 1);
        assert_refused("y", device.embed(wrong.view_mut(), pt.view(), pi.view(), first));
        let refused = device.embed_backward(
            output::<T::Acc, D>(device, rows, h + 1).view_mut(),
            pdy.view(),
            pi.view(),
            first,
            None,
        );
        assert_refused("dtable", refused);
    }
}
