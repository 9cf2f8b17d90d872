//! The heads that share keys and values, backward.

use faer::Accum;

use super::softmax::{row_dots, softmax_backward};
use super::{Sight, TILE};
use crate::cpu::float::CpuFloat;
use crate::cpu::matrix::{Head, Mat, MatMut, blocks};

/// Gradients of one head of keys and values, summed over the query heads that read it.
pub(super) struct HeadGradient<'a, T> {
    k: Vec<T>,
    v: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    keys: usize,
    dim: usize,
    v_dim: usize,
    scale: T,
    sight: Sight<'a>,
}

impl<'a, T: CpuFloat> HeadGradient<'a, T> {
    pub(super) fn new(k: Mat<'_, T>, v: Mat<'_, T>, scale: T, sight: Sight<'a>) -> Self {
        let (keys, dim, v_dim) = (k.rows(), k.cols(), v.cols());
        let [dk, dv] = [dim, v_dim].map(|dim| vec![T::ZERO; keys * dim]);
        HeadGradient { k: k.packed(), v: v.packed(), dk, dv, keys, dim, v_dim, scale, sight }
    }

    /// Writes `dk` and `dv`.
    pub(super) fn finish(self, mut dk: Head<'_, T>, mut dv: Head<'_, T>) {
        for (i, (k, v)) in self.dk.chunks_exact(self.dim).zip(self.dv.chunks_exact(self.v_dim)).enumerate() {
            dk.row(i).copy_from_slice(k);
            dv.row(i).copy_from_slice(v);
        }
    }

    /// Overwrites the columns of `dq` from `at` on and adds to `dk` and `dv` what one query head contributes.
    pub(super) fn add(
        &mut self,
        dq: &mut Head<'_, T>,
        at: usize,
        d_o: Mat<'_, T>,
        q: Mat<'_, T>,
        o: Mat<'_, T>,
        lse: Mat<'_, T>,
    ) {
        let (dim, v_dim) = (self.dim, self.v_dim);
        let (mut tile, mut dtile) = (vec![T::ZERO; TILE * TILE], vec![T::ZERO; TILE * TILE]);
        let mut dq_tile = vec![T::ZERO; TILE * dim];
        for queries in blocks(q.rows(), TILE) {
            let n = queries.len();
            let (q, d_o) = (q.row_range(queries.clone()).packed(), d_o.row_range(queries.clone()).packed());
            let (q, d_o) = (Mat::new(&q, n, dim), Mat::new(&d_o, n, v_dim));
            let lse = lse.row_range(queries.clone()).packed();
            let mut delta = [T::ZERO; TILE];
            row_dots(&mut delta[..n], d_o, o.row_range(queries.clone()));
            dq_tile.fill(T::ZERO);
            for keys in blocks(self.keys, TILE).filter(|keys| self.sight.meets(&queries, keys)) {
                let cols = keys.len();
                let [k_part, v_part] = [dim, v_dim].map(|dim| keys.start * dim..keys.end * dim);
                let k = Mat::new(&self.k[k_part.clone()], cols, dim).faer();
                let v = Mat::new(&self.v[v_part.clone()], cols, v_dim).faer();
                T::matmul(
                    MatMut::new(&mut tile, n, cols).faer(),
                    Accum::Replace,
                    q.faer(),
                    k.transpose(),
                    self.scale,
                );
                T::matmul(
                    MatMut::new(&mut dtile, n, cols).faer(),
                    Accum::Replace,
                    d_o.faer(),
                    v.transpose(),
                    T::ONE,
                );
                softmax_backward(
                    MatMut::new(&mut tile, n, cols),
                    MatMut::new(&mut dtile, n, cols),
                    &lse,
                    &delta[..n],
                    self.scale,
                    self.sight,
                    queries.start,
                    keys,
                );
                let (p, ds) = (Mat::new(&tile, n, cols).faer(), Mat::new(&dtile, n, cols).faer());
                let dv = MatMut::new(&mut self.dv[v_part], cols, v_dim).faer();
                T::matmul(dv, Accum::Add, p.transpose(), d_o.faer(), T::ONE);
                let dk = MatMut::new(&mut self.dk[k_part], cols, dim).faer();
                T::matmul(dk, Accum::Add, ds.transpose(), q.faer(), T::ONE);
                T::matmul(MatMut::new(&mut dq_tile, n, dim).faer(), Accum::Add, ds, k, T::ONE);
            }
            for (query, tile) in queries.zip(dq_tile.chunks_exact(dim)) {
                dq.row(query)[at..at + dim].copy_from_slice(tile);
            }
        }
    }
}
