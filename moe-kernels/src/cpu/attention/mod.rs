//! Attention in tiles: scores exist for one tile of queries and keys at a time.

mod backward;
mod forward;
mod softmax;

use std::ops::Range;

use self::backward::HeadGradient;
use self::forward::forward_head;
use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use crate::check;
use crate::family::{Attention, AttentionMask, AttentionShape};
use crate::{Result, View, ViewMut};

/// Queries and keys of one tile.
const TILE: usize = 64;

/// Which keys the queries of one sequence see.
#[derive(Debug, Clone, Copy)]
struct Sight<'a> {
    mask: AttentionMask,
    /// The key at whose position the first query stands.
    first_query: usize,
    /// The first key of every query of every sequence.
    first_keys: Option<&'a [i32]>,
    batch: usize,
    sequence: usize,
}

impl<'a> Sight<'a> {
    fn new(shape: &AttentionShape, first_keys: Option<&'a [i32]>, sequence: usize) -> Self {
        let AttentionShape { mask, first_query, batch, .. } = *shape;
        Sight { mask, first_query, first_keys, batch, sequence }
    }

    /// The keys that `query` sees.
    #[inline(always)]
    fn of(self, query: usize) -> Range<usize> {
        let end = self.first_query.saturating_add(query).saturating_add(1);
        let seen = match self.mask {
            AttentionMask::Full => 0..usize::MAX,
            AttentionMask::Causal => 0..end,
            AttentionMask::SlidingWindow { window } => end.saturating_sub(window)..end,
        };
        match self.first_keys {
            None => seen,
            Some(first) => {
                let first = first[query * self.batch + self.sequence].max(0) as usize;
                seen.start.max(first)..seen.end.max(first)
            }
        }
    }

    /// Those of `keys` that `query` sees, counted from the first of `keys`.
    #[inline(always)]
    fn visible(self, query: usize, keys: &Range<usize>) -> Range<usize> {
        let seen = self.of(query);
        let within = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
        within(seen.start)..within(seen.end)
    }

    /// Whether any of `queries` sees any of `keys`.
    fn meets(self, queries: &Range<usize>, keys: &Range<usize>) -> bool {
        queries.clone().any(|query| !self.visible(query, keys).is_empty())
    }
}

/// The rows of one head of one sequence in a matrix of sequence-major rows.
fn head<'a, T>(m: Mat<'a, T>, batch: usize, sequence: usize, head: usize, dim: usize) -> Mat<'a, T> {
    let len = m.rows() / batch;
    m.col_range(head * dim..(head + 1) * dim).every(sequence, batch, len)
}

/// The first key of every row of queries, if there are such.
fn first_keys<'a>(
    kernel: &'static str,
    s: &AttentionShape,
    keys: Option<View<'a, i32, Cpu>>,
) -> Result<Option<&'a [i32]>> {
    check::first_keys(kernel, s, keys.map(|keys| keys.shape()))?;
    Ok(keys.map(|keys| Mat::from(keys).vector()))
}

impl<T: CpuFloat> Attention<T> for Cpu {
    fn attention(
        &self,
        mut o: ViewMut<'_, T, Self>,
        mut lse: ViewMut<'_, T, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()> {
        let s = *shape;
        let [q_shape, k_shape] = [[("q", q.shape())], [("k", k.shape())]];
        let [o_shape, v_shape] = [[("o", o.shape())], [("v", v.shape())]];
        check::attention("attention", &s, &q_shape, &k_shape, &o_shape, &v_shape, lse.shape())?;
        let first_keys = self::first_keys("attention", &s, first_keys)?;
        let (q, k, v) = (Mat::from(q), Mat::from(k), Mat::from(v));
        let o = MatMut::from(&mut o).heads(s.batch, s.v_head_dim);
        let lse = MatMut::from(&mut lse).heads(s.batch, 1);
        let tasks = o.into_iter().zip(lse).enumerate().collect();
        self.for_each(tasks, |(task, (o, lse))| {
            let (b, h) = (task / s.heads, task % s.heads);
            let kv = h / (s.heads / s.kv_heads);
            let q = head(q, s.batch, b, h, s.head_dim);
            let (k, v) = (head(k, s.batch, b, kv, s.head_dim), head(v, s.batch, b, kv, s.v_head_dim));
            let sight = Sight::new(&s, first_keys, b);
            forward_head(o, lse, q, k, v, T::from_f64(s.scale), sight);
        })
    }

    fn attention_merge(
        &self,
        mut o: ViewMut<'_, T, Self>,
        mut lse: ViewMut<'_, T, Self>,
        o_part: View<'_, T, Self>,
        lse_part: View<'_, T, Self>,
        v_head_dim: usize,
    ) -> Result<()> {
        let [n, heads] = check::attention_merge("attention_merge", &o, &lse, o_part, lse_part, v_head_dim)?;
        let (o_part, lse_part) = (Mat::from(o_part), Mat::from(lse_part));
        let (mut o, mut lse) = (MatMut::from(&mut o), MatMut::from(&mut lse));
        let tasks = blocks(n, rows_per_piece(heads * v_head_dim))
            .map(|r| {
                let outputs = (o.take_rows(r.len()), lse.take_rows(r.len()));
                (outputs, o_part.row_range(r.clone()), lse_part.row_range(r))
            })
            .collect();
        self.for_each(tasks, |((o, lse), o_part, lse_part)| {
            softmax::merge(o, lse, o_part, lse_part, v_head_dim)
        })
    }

    fn attention_backward(
        &self,
        mut dq: ViewMut<'_, T, Self>,
        mut dk: ViewMut<'_, T, Self>,
        mut dv: ViewMut<'_, T, Self>,
        d_o: View<'_, T, Self>,
        q: View<'_, T, Self>,
        k: View<'_, T, Self>,
        v: View<'_, T, Self>,
        o: View<'_, T, Self>,
        lse: View<'_, T, Self>,
        first_keys: Option<View<'_, i32, Self>>,
        shape: &AttentionShape,
    ) -> Result<()> {
        let s = *shape;
        let queries = [("dq", dq.shape()), ("q", q.shape())];
        let keys = [("dk", dk.shape()), ("k", k.shape())];
        let outputs = [("d_o", d_o.shape()), ("o", o.shape())];
        let values = [("dv", dv.shape()), ("v", v.shape())];
        check::attention("attention_backward", &s, &queries, &keys, &outputs, &values, lse.shape())?;
        let first_keys = self::first_keys("attention_backward", &s, first_keys)?;
        let group = s.heads / s.kv_heads;
        let (d_o, q, k, v) = (Mat::from(d_o), Mat::from(q), Mat::from(k), Mat::from(v));
        let (o, lse) = (Mat::from(o), Mat::from(lse));
        // A task owns one head of keys and values and the query heads that read it.
        let dq = MatMut::from(&mut dq).heads(s.batch, group * s.head_dim);
        let dk = MatMut::from(&mut dk).heads(s.batch, s.head_dim);
        let dv = MatMut::from(&mut dv).heads(s.batch, s.v_head_dim);
        let tasks = dq.into_iter().zip(dk).zip(dv).enumerate().collect();
        self.for_each(tasks, |(task, ((mut dq, dk), dv))| {
            let (b, kv) = (task / s.kv_heads, task % s.kv_heads);
            let of = |m, h| head(m, s.batch, b, h, s.head_dim);
            let of_value = |m, h| head(m, s.batch, b, h, s.v_head_dim);
            let sight = Sight::new(&s, first_keys, b);
            let mut grad = HeadGradient::new(of(k, kv), of_value(v, kv), T::from_f64(s.scale), sight);
            for g in 0..group {
                let h = kv * group + g;
                let lse = head(lse, s.batch, b, h, 1);
                grad.add(&mut dq, g * s.head_dim, of_value(d_o, h), of(q, h), of_value(o, h), lse);
            }
            grad.finish(dk, dv);
        })
    }
}
