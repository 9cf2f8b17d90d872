//! Attention.

use super::GRADIENT;
use super::host::{
    Matrix, Placed, Random, assert_close, assert_refused, gradient, output, place, place_ints,
};
use crate::family::{Attention, AttentionMask, AttentionShape};
use crate::{Float, View};

/// The first key of every row of queries, if keys before it are hidden.
type FirstKeys<'a> = Option<&'a [i32]>;

/// What a query of one head sees: `exp(score − lse)` per key, and the log-sum-exp.
fn softmax(
    q: &Matrix,
    k: &Matrix,
    first: FirstKeys<'_>,
    s: &AttentionShape,
    [b, h, i]: [usize; 3],
) -> (Vec<f64>, f64) {
    let at = s.first_query + i;
    let sees = |j: usize| {
        let by_mask = match s.mask {
            AttentionMask::Full => true,
            AttentionMask::Causal => j <= at,
            AttentionMask::SlidingWindow { window } => j <= at && at < j + window,
        };
        by_mask && first.is_none_or(|first| first[i * s.batch + b] <= j as i32)
    };
    let kv = h / (s.heads / s.kv_heads);
    let score = |j: usize| {
        let dot = |d| q.at(i * s.batch + b, h * s.head_dim + d) * k.at(j * s.batch + b, kv * s.head_dim + d);
        s.scale * (0..s.head_dim).map(dot).sum::<f64>()
    };
    let scores: Vec<f64> =
        (0..s.kv_len).map(|j| if sees(j) { score(j) } else { f64::NEG_INFINITY }).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; s.kv_len], max);
    }
    let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
}

fn forward(q: &Matrix, k: &Matrix, v: &Matrix, first: FirstKeys<'_>, s: &AttentionShape) -> (Matrix, Matrix) {
    let mut o = Matrix::from_fn(s.q_len * s.batch, s.heads * s.v_head_dim, |_, _| 0.0);
    let mut lse = Matrix::from_fn(s.q_len * s.batch, s.heads, |_, _| 0.0);
    for (b, h, i) in
        (0..s.batch).flat_map(|b| (0..s.heads).flat_map(move |h| (0..s.q_len).map(move |i| (b, h, i))))
    {
        let (p, l) = softmax(q, k, first, s, [b, h, i]);
        let row = i * s.batch + b;
        lse.data[row * s.heads + h] = l;
        let kv = h / (s.heads / s.kv_heads);
        for d in 0..s.v_head_dim {
            let value = |(j, p): (usize, &f64)| p * v.at(j * s.batch + b, kv * s.v_head_dim + d);
            o.data[row * o.cols + h * s.v_head_dim + d] = p.iter().enumerate().map(value).sum();
        }
    }
    (o, lse)
}

struct Operands<T: Float, D: Attention<T>> {
    q: Placed<T, D>,
    k: Placed<T, D>,
    v: Placed<T, D>,
    first_keys: Option<Placed<i32, D>>,
}

impl<T: Float, D: Attention<T>> Operands<T, D> {
    fn new(device: &D, [q, k, v]: [&Matrix; 3], first: FirstKeys<'_>) -> Self {
        let [q, k, v] = [q, k, v].map(|m| place(device, m));
        let first_keys = first.map(|first| place_ints(device, 1, first.len(), first));
        Operands { q, k, v, first_keys }
    }

    fn first_keys(&self) -> Option<View<'_, i32, D>> {
        self.first_keys.as_ref().map(Placed::view)
    }
}

fn run<T: Float, D: Attention<T>>(
    device: &D,
    x: &Operands<T, D>,
    s: &AttentionShape,
) -> (Placed<T, D>, Placed<T::Acc, D>) {
    let mut o = output::<T, D>(device, s.q_len * s.batch, s.heads * s.v_head_dim);
    let mut lse = output::<T::Acc, D>(device, s.q_len * s.batch, s.heads);
    let (q, k, v) = (x.q.view(), x.k.view(), x.v.view());
    device.attention(o.view_mut(), lse.view_mut(), q, k, v, x.first_keys(), s).expect("attention");
    (o, lse)
}

/// [`Attention`]: masks, first keys, grouped queries, values wider and narrower than keys, several sequences, lengths around tiles, no
/// keys; blocks that merge to the
/// whole, forward and backward.
pub fn attention<T: Float, D: Attention<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(16);
    // (batch, q_len, first_query, kv_len, heads, kv_heads, head_dim, v_head_dim, whether differences are affordable)
    let cases = [
        (1, 1, 0, 1, 1, 1, 1, 1, true),
        (2, 5, 0, 5, 3, 3, 4, 3, true),
        (3, 4, 0, 4, 4, 2, 3, 3, true),
        (1, 3, 0, 7, 2, 1, 3, 5, true),
        (2, 3, 4, 7, 2, 1, 3, 5, true),
        (1, 7, 0, 3, 2, 1, 5, 4, true),
        (2, 3, 0, 0, 2, 1, 2, 1, true),
        (2, 0, 3, 3, 2, 1, 2, 3, true),
        (2, 67, 0, 67, 1, 1, 3, 3, false),
        (1, 131, 0, 131, 4, 2, 16, 16, false),
        (2, 64, 0, 129, 2, 2, 9, 6, false),
        (2, 66, 63, 129, 2, 1, 9, 6, false),
        (1, 1, 199, 200, 4, 2, 8, 5, false),
        (1, 200, 0, 65, 6, 2, 8, 12, false),
        (1, 140, 0, 140, 2, 1, 64, 64, false),
        (1, 70, 130, 200, 2, 1, 128, 128, false),
        (1, 140, 0, 140, 1, 1, 192, 128, false),
    ];
    for (batch, q_len, first_query, kv_len, heads, kv_heads, head_dim, v_head_dim, affordable) in cases {
        let windows = [2, 3, 64, 100].map(|window| AttentionMask::SlidingWindow { window });
        for mask in [AttentionMask::Full, AttentionMask::Causal].into_iter().chain(windows) {
            let scale = 1.5 / (head_dim as f64).sqrt();
            let s = AttentionShape {
                batch,
                q_len,
                kv_len,
                first_query,
                heads,
                kv_heads,
                head_dim,
                v_head_dim,
                scale,
                mask,
            };
            let [n, m] = [q_len * batch, kv_len * batch];
            let q = random.matrix::<T>(n, heads * head_dim);
            let k = random.matrix::<T>(m, kv_heads * head_dim);
            let v = random.matrix::<T>(m, kv_heads * v_head_dim);
            let d_o = random.matrix::<T>(n, heads * v_head_dim);
            let (documents, any) = (documents(&s), random.ints(n, kv_len / 2 + 1));
            // Where few queries see few keys, gradients may vanish, and rounding has nothing to be compared with.
            let any = (!affordable).then_some(Some(&any[..]));
            for first in [None, Some(&documents[..])].into_iter().chain(any) {
                let what = |what: &str| format!("{what}, {s:?}, first keys {first:?}");
                let x = Operands::new(device, [&q, &k, &v], first);
                let (want_o, want_lse) = forward(&q, &k, &v, first, &s);
                let (o, lse) = run(device, &x, &s);
                assert_close(&what("o"), &o.read(), &want_o, tolerance);
                assert_close(&what("lse"), &lse.read(), &want_lse, tolerance);

                let [dq, dk, dv] = backward(device, &x, &place(device, &d_o), &o, &lse, &s);
                let want = if affordable {
                    [
                        gradient(&q, |q| forward(q, &k, &v, first, &s).0.dot(&d_o)),
                        gradient(&k, |k| forward(&q, k, &v, first, &s).0.dot(&d_o)),
                        gradient(&v, |v| forward(&q, &k, v, first, &s).0.dot(&d_o)),
                    ]
                } else {
                    formula(&q, &k, &v, first, &d_o, &s)
                };
                let tolerance = if affordable { tolerance.max(GRADIENT) } else { tolerance };
                for (name, got, want) in [("dq", dq, &want[0]), ("dk", dk, &want[1]), ("dv", dv, &want[2])] {
                    assert_close(&what(name), &got, want, 4.0 * tolerance);
                }
            }
            let x = Operands::new(device, [&q, &k, &v], Some(&documents));
            refusals(device, &x, &s);
        }
    }
    large_scores::<T, D>(device, tolerance);
    hidden_blocks::<T, D>(device, 3, tolerance);
    hidden_blocks::<T, D>(device, 64, tolerance);
    window_of_one::<T, D>(device);
    ring::<T, D>(device, tolerance);
}

/// First keys of queries whose sequences are documents of 1, 2, 1 and then 70 tokens, other sequences' being longer.
fn documents(s: &AttentionShape) -> Vec<i32> {
    let start = |i: usize, b: usize| match i / (b + 1) {
        0 => 0,
        1 | 2 => 1,
        3 => 3,
        i => 4 + (i - 4) / 70 * 70,
    };
    (0..s.q_len).flat_map(|i| (0..s.batch).map(move |b| (start(i, b) * (b + 1)) as i32)).collect()
}

fn backward<T: Float, D: Attention<T>>(
    device: &D,
    x: &Operands<T, D>,
    d_o: &Placed<T, D>,
    o: &Placed<T, D>,
    lse: &Placed<T::Acc, D>,
    s: &AttentionShape,
) -> [Matrix; 3] {
    let mut dq = output::<T, D>(device, s.q_len * s.batch, s.heads * s.head_dim);
    let mut dk = output::<T, D>(device, s.kv_len * s.batch, s.kv_heads * s.head_dim);
    let mut dv = output::<T, D>(device, s.kv_len * s.batch, s.kv_heads * s.v_head_dim);
    device
        .attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            d_o.view(),
            x.q.view(),
            x.k.view(),
            x.v.view(),
            o.view(),
            lse.view(),
            x.first_keys(),
            s,
        )
        .expect("attention_backward");
    [dq.read(), dk.read(), dv.read()]
}

/// The gradients by their formula, for shapes where differences would take too long: `dv = Pᵀ do`,
/// `dS = P ⊙ (do vᵀ − rowsum(do ⊙ o)) · scale`, `dq = dS k`, `dk = dSᵀ q`. The small shapes hold it to differences.
fn formula(
    q: &Matrix,
    k: &Matrix,
    v: &Matrix,
    first: FirstKeys<'_>,
    d_o: &Matrix,
    s: &AttentionShape,
) -> [Matrix; 3] {
    let zero = |m: &Matrix| Matrix::from_fn(m.rows, m.cols, |_, _| 0.0);
    let (mut dq, mut dk, mut dv) = (zero(q), zero(k), zero(v));
    for (b, h, i) in
        (0..s.batch).flat_map(|b| (0..s.heads).flat_map(move |h| (0..s.q_len).map(move |i| (b, h, i))))
    {
        let (p, _) = softmax(q, k, first, s, [b, h, i]);
        let (row, kv) = (i * s.batch + b, h / (s.heads / s.kv_heads));
        let (at, kv_at) = (h * s.head_dim, kv * s.head_dim);
        let (o_at, v_at) = (h * s.v_head_dim, kv * s.v_head_dim);
        let dp = |j: usize| -> f64 {
            (0..s.v_head_dim).map(|d| d_o.at(row, o_at + d) * v.at(j * s.batch + b, v_at + d)).sum()
        };
        let mean: f64 = p.iter().enumerate().map(|(j, p)| p * dp(j)).sum();
        for (j, p) in p.iter().enumerate() {
            let ds = p * (dp(j) - mean) * s.scale;
            let key = j * s.batch + b;
            for d in 0..s.head_dim {
                dq.data[row * q.cols + at + d] += ds * k.at(key, kv_at + d);
                dk.data[key * k.cols + kv_at + d] += ds * q.at(row, at + d);
            }
            for d in 0..s.v_head_dim {
                dv.data[key * v.cols + v_at + d] += p * d_o.at(row, o_at + d);
            }
        }
    }
    [dq, dk, dv]
}

fn refusals<T: Float, D: Attention<T>>(device: &D, x: &Operands<T, D>, s: &AttentionShape) {
    let mut o = output::<T, D>(device, s.q_len * s.batch, s.heads * s.v_head_dim);
    let mut lse = output::<T::Acc, D>(device, s.q_len * s.batch, s.heads);
    let mut attempt = |what: &str, s: AttentionShape| {
        let (q, k, v) = (x.q.view(), x.k.view(), x.v.view());
        let result = device.attention(o.view_mut(), lse.view_mut(), q, k, v, x.first_keys(), &s);
        assert_refused(what, result);
    };
    attempt("q_len", AttentionShape { q_len: s.q_len + 1, ..*s });
    attempt("kv_len", AttentionShape { kv_len: s.kv_len + 1, ..*s });
    attempt("batch 0", AttentionShape { batch: 0, ..*s });
    attempt("head_dim 0", AttentionShape { head_dim: 0, ..*s });
    attempt("v_head_dim 0", AttentionShape { v_head_dim: 0, ..*s });
    attempt("another v_head_dim", AttentionShape { v_head_dim: s.v_head_dim + 1, ..*s });
    attempt("window 0", AttentionShape { mask: AttentionMask::SlidingWindow { window: 0 }, ..*s });
    attempt("kv_heads 0", AttentionShape { kv_heads: 0, ..*s });
    attempt("kv_heads that do not divide", AttentionShape { kv_heads: s.heads + 1, ..*s });
    let rows = s.q_len * s.batch + 1;
    let wrong = place_ints(device, 1, rows, &vec![0; rows]);
    let (q, k, v) = (x.q.view(), x.k.view(), x.v.view());
    let refused = device.attention(o.view_mut(), lse.view_mut(), q, k, v, Some(wrong.view()), s);
    assert_refused("first_keys", refused);
}

/// Keys that no query sees may hold anything: their blocks are skipped, and their gradients are 0.
fn hidden_blocks<T: Float, D: Attention<T>>(device: &D, dim: usize, tolerance: f64) {
    let (len, from) = (600, 512);
    let s = AttentionShape {
        batch: 1,
        q_len: len,
        kv_len: len,
        first_query: 0,
        heads: 1,
        kv_heads: 1,
        head_dim: dim,
        v_head_dim: dim,
        scale: 0.5,
        mask: AttentionMask::Full,
    };
    let mut random = Random::new(21);
    let [q, k, v, d_o] = [(); 4].map(|()| random.matrix::<T>(len, dim));
    let first = vec![from as i32; len];
    let (want, _) = forward(&q, &k, &v, Some(&first), &s);
    let want_gradients = formula(&q, &k, &v, Some(&first), &d_o, &s);
    let spoilt =
        |m: &Matrix| Matrix::from_fn(len, dim, |i, j| if i < from { f64::INFINITY } else { m.at(i, j) });
    let x = Operands::new(device, [&q, &spoilt(&k), &spoilt(&v)], Some(&first));
    let (o, lse) = run(device, &x, &s);
    assert_close("o beside hidden blocks", &o.read(), &want, tolerance);
    let gradients = backward(device, &x, &place(device, &d_o), &o, &lse, &s);
    for (got, want) in gradients.iter().zip(&want_gradients) {
        assert_close("gradients beside hidden blocks", got, want, 4.0 * tolerance);
    }
}

/// A query that sees itself alone gives its own value, exactly.
fn window_of_one<T: Float, D: Attention<T>>(device: &D) {
    let (len, dim) = (130, 3);
    let s = AttentionShape {
        batch: 1,
        q_len: len,
        kv_len: len,
        first_query: 0,
        heads: 1,
        kv_heads: 1,
        head_dim: dim,
        v_head_dim: dim,
        scale: 0.5,
        mask: AttentionMask::SlidingWindow { window: 1 },
    };
    let mut random = Random::new(20);
    let [q, k, v] = [(); 3].map(|()| random.matrix::<T>(len, dim));
    let x = Operands::new(device, [&q, &k, &v], None);
    assert_close("o of a window of one", &run(device, &x, &s).0.read(), &v, 0.0);
}

/// Scores far beyond where `exp` overflows, their maximum in the last block of keys.
fn large_scores<T: Float, D: Attention<T>>(device: &D, tolerance: f64) {
    let (len, dim) = (130, 2);
    let s = AttentionShape {
        batch: 1,
        q_len: len,
        kv_len: len,
        first_query: 0,
        heads: 1,
        kv_heads: 1,
        head_dim: dim,
        v_head_dim: dim,
        scale: 8.0,
        mask: AttentionMask::Causal,
    };
    let q = Matrix::from_fn(len, dim, |_, _| 4.0);
    let k = Matrix::from_fn(len, dim, |j, _| j as f64 / 4.0);
    let v = Random::new(17).matrix::<T>(len, dim);
    let x = Operands::new(device, [&q, &k, &v], None);
    let (o, lse) = run(device, &x, &s);
    let (want_o, want_lse) = forward(&q, &k, &v, None, &s);
    assert_close("o of large scores", &o.read(), &want_o, 10.0 * tolerance);
    assert_close("lse of large scores", &lse.read(), &want_lse, tolerance);
}

/// Two blocks of keys, one of them seen by nobody at first, as ring attention has them.
fn ring<T: Float, D: Attention<T>>(device: &D, tolerance: f64) {
    let mut random = Random::new(18);
    let (batch, len, heads, kv_heads, head_dim, v_head_dim) = (2, 35, 4, 2, 3, 5);
    let whole = AttentionShape {
        batch,
        q_len: len,
        kv_len: 2 * len,
        first_query: 0,
        heads,
        kv_heads,
        head_dim,
        v_head_dim,
        scale: 0.7,
        mask: AttentionMask::Full,
    };
    let n = len * batch;
    let q = random.matrix::<T>(n, heads * head_dim);
    let k = random.matrix::<T>(2 * n, kv_heads * head_dim);
    let v = random.matrix::<T>(2 * n, kv_heads * v_head_dim);
    let half = |m: &Matrix, part: usize| Matrix::from_fn(n, m.cols, |i, c| m.at(part * n + i, c));
    let (want_o, want_lse) = forward(&q, &k, &v, None, &whole);

    // Nothing seen yet: any o, −∞.
    let mut o = place::<T::Acc, D>(device, &Matrix::from_fn(n, heads * v_head_dim, |_, _| 0.0));
    let mut lse = place::<T::Acc, D>(device, &Matrix::from_fn(n, heads, |_, _| f64::NEG_INFINITY));
    let block = AttentionShape { kv_len: len, ..whole };
    let block_of = |part| Operands::new(device, [&q, &half(&k, part), &half(&v, part)], None);
    let blocks = [0, 1].map(block_of);
    let empty = |m: &Matrix| Matrix { rows: 0, data: Vec::new(), ..*m };
    let nothing = Operands::new(device, [&q, &empty(&k), &empty(&v)], None);
    let merge =
        |o: &mut Placed<T::Acc, D>, lse: &mut Placed<T::Acc, D>, x: &Operands<T, D>, s: &AttentionShape| {
            let (part, part_lse) = run(device, x, s);
            device
                .attention_merge(o.view_mut(), lse.view_mut(), part.view(), part_lse.view(), v_head_dim)
                .expect("attention_merge");
        };
    merge(&mut o, &mut lse, &nothing, &AttentionShape { kv_len: 0, ..whole });
    assert_eq!(o.read().data, vec![0.0; n * heads * v_head_dim], "no keys, no output");
    for x in &blocks {
        merge(&mut o, &mut lse, x, &block);
        merge(&mut o, &mut lse, &nothing, &AttentionShape { kv_len: 0, ..whole });
    }
    assert_close("merged o", &o.read(), &want_o, 2.0 * tolerance);
    assert_close("merged lse", &lse.read(), &want_lse, 2.0 * tolerance);

    let d_o = random.matrix::<T>(n, heads * v_head_dim);
    let want = formula(&q, &k, &v, None, &d_o, &whole);
    let (pd, po) = (place::<T, D>(device, &d_o), place::<T, D>(device, &want_o));
    let plse = place::<T::Acc, D>(device, &want_lse);
    let [first, second] = [0, 1].map(|part: usize| backward(device, &blocks[part], &pd, &po, &plse, &block));
    assert_close("dq of two blocks", &first[0].plus(&second[0]), &want[0], 4.0 * tolerance);
    for (part, got) in [first, second].iter().enumerate() {
        assert_close("dk of a block", &got[1], &half(&want[1], part), 4.0 * tolerance);
        assert_close("dv of a block", &got[2], &half(&want[2], part), 4.0 * tolerance);
    }

    let mut wrong = output::<T::Acc, D>(device, n, heads * v_head_dim + 1);
    let (part, part_lse) = run(device, &blocks[0], &block);
    let refused =
        device.attention_merge(wrong.view_mut(), lse.view_mut(), part.view(), part_lse.view(), v_head_dim);
    assert_refused("o", refused);
}
