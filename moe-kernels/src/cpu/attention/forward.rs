//! One head forward.

use faer::Accum;

use super::softmax::{normalise, softmax_step};
use super::{Sight, TILE};
use crate::cpu::float::CpuFloat;
use crate::cpu::matrix::{Head, Mat, MatMut, blocks};

/// Attention of one head of one sequence.
pub(super) fn forward_head<T: CpuFloat>(
    mut o: Head<'_, T>,
    mut lse: Head<'_, T>,
    q: Mat<'_, T>,
    k: Mat<'_, T>,
    v: Mat<'_, T>,
    scale: T,
    sight: Sight<'_>,
) {
    let (dim, v_dim) = (q.cols(), v.cols());
    let (k_packed, v_packed) = (k.packed(), v.packed());
    let (k, v) = (Mat::new(&k_packed, k.rows(), dim), Mat::new(&v_packed, v.rows(), v_dim));
    let (mut scores, mut acc) = (vec![T::ZERO; TILE * TILE], vec![T::ZERO; TILE * v_dim]);
    for queries in blocks(q.rows(), TILE) {
        let n = queries.len();
        let q = q.row_range(queries.clone()).packed();
        let q = Mat::new(&q, n, dim);
        let (mut max, mut sum) = ([T::NEG_INFINITY; TILE], [T::ZERO; TILE]);
        acc.fill(T::ZERO);
        for keys in blocks(k.rows(), TILE).filter(|keys| sight.meets(&queries, keys)) {
            let scores = &mut scores[..n * keys.len()];
            let (k, v) = (k.row_range(keys.clone()), v.row_range(keys.clone()));
            let cols = keys.len();
            T::matmul(
                MatMut::new(scores, n, cols).faer(),
                Accum::Replace,
                q.faer(),
                k.faer().transpose(),
                scale,
            );
            let tile = MatMut::new(scores, n, cols);
            softmax_step(
                tile,
                &mut max,
                &mut sum,
                MatMut::new(&mut acc, n, v_dim),
                sight,
                queries.start,
                keys,
            );
            let p = Mat::new(scores, n, cols).faer();
            T::matmul(MatMut::new(&mut acc, n, v_dim).faer(), Accum::Add, p, v.faer(), T::ONE);
        }
        normalise(MatMut::new(&mut acc, n, v_dim), &sum[..n]);
        for (i, query) in queries.enumerate() {
            o.row(query).copy_from_slice(&acc[i * v_dim..][..v_dim]);
            lse.row(query)[0] = if sum[i] == T::ZERO { T::NEG_INFINITY } else { max[i] + sum[i].ln() };
        }
    }
}
