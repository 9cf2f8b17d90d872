//! Rotary position embedding.

use super::host::{Matrix, Random, assert_close, assert_refused, output, place, place_ints};
use crate::Float;
use crate::family::{Rope, Rotation};

/// [`Rope`] against complex rotation; backward is the transpose, and undoes forward.
pub fn rope<T: Float, D: Rope<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(7);
    for (n, heads, dim, table) in
        [(0, 2, 4, 3), (5, 1, 2, 9), (7, 3, 6, 8), (9, 2, 64, 33), (300, 3, 20, 300)]
    {
        let what = format!("{n} rows, {heads} heads of {dim}");
        let half = dim / 2;
        let angle = |p: usize, j: usize| p as f64 * 10_000f64.powf(-(j as f64) / half as f64);
        let cos = Matrix::from_fn(table, half, |p, j| T::Acc::from_f64(angle(p, j).cos()).to_f64());
        let sin = Matrix::from_fn(table, half, |p, j| T::Acc::from_f64(angle(p, j).sin()).to_f64());
        let positions = random.ints(n, table);
        let x = random.matrix::<T>(n, heads * dim);
        let want = Matrix::from_fn(n, heads * dim, |i, c| {
            let (h, d) = (c / dim, c % dim);
            let (j, p) = (d % half, positions[i] as usize);
            let (re, im) = (x.at(i, h * dim + j), x.at(i, h * dim + half + j));
            let (c, s) = (cos.at(p, j), sin.at(p, j));
            if d < half { re * c - im * s } else { re * s + im * c }
        });
        let px = place::<T, D>(device, &x);
        let (pc, ps) = (place::<T::Acc, D>(device, &cos), place::<T::Acc, D>(device, &sin));
        let pp = place_ints(device, 1, n, &positions);
        let mut y = output::<T, D>(device, n, heads * dim);
        let rotate = |y: &mut super::host::Placed<T, D>, x: &super::host::Placed<T, D>, dim, r| {
            device.rope(y.view_mut(), x.view(), pc.view(), ps.view(), pp.view(), dim, r)
        };
        rotate(&mut y, &px, dim, Rotation::Forward).expect("rope");
        assert_close(&format!("rope {what}"), &y.read(), &want, tolerance);

        let mut back = output::<T, D>(device, n, heads * dim);
        rotate(&mut back, &y, dim, Rotation::Backward).expect("rope");
        assert_close(&format!("rope back {what}"), &back.read(), &x, 4.0 * tolerance);
        // ⟨R x, g⟩ = ⟨x, Rᵀ g⟩.
        let g = random.matrix::<T>(n, heads * dim);
        rotate(&mut back, &place(device, &g), dim, Rotation::Backward).expect("rope");
        let (a, b) = (Matrix::row(&[y.read().dot(&g)]), Matrix::row(&[back.read().dot(&x)]));
        assert_close(&format!("transpose {what}"), &a, &b, tolerance * (1 + n * heads * dim) as f64);

        assert_refused("head_dim 0", rotate(&mut y, &px, 0, Rotation::Forward));
        assert_refused("an odd head_dim", rotate(&mut y, &px, dim + 1, Rotation::Forward));
        assert_refused("other tables", rotate(&mut y, &px, 2 * dim, Rotation::Forward));
        for wrong in [-1, table as i32].into_iter().filter(|_| n > 0) {
            let pp = place_ints(device, 1, n, &vec![wrong; n]);
            let refused =
                device.rope(y.view_mut(), px.view(), pc.view(), ps.view(), pp.view(), dim, Rotation::Forward);
            assert_refused("a position outside the tables", refused);
        }
    }
}
