//! The main kernels at the shapes of one-rank training: 2,048 tokens, hidden 256, 8 experts of 512 (top-2), 4 heads
//! of 64, sequence 256, in `f32`.
//!
//! `cargo bench -p moe-kernels -- grouped` runs those whose name holds `grouped`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use moe_kernels::family::{
    Activation, AdamW, AdamWRun, AdamWSlice, Attention, AttentionMask, AttentionShape, Elementwise,
    GateFunction, Gemm, GroupedGemm, Loss, Norm, Op, Optim, Reduce, Rope, RotaryHead, RotaryPairs, Rotation,
    RouteInput, RouteOutput, Routing, Rows, ScoreFunction, SortOutput,
};
use moe_kernels::{Cpu, Tensor};

type Matrix = Tensor<f32, Cpu>;

const TOKENS: usize = 2048;
const HIDDEN: usize = 256;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const FFN: usize = 512;
const BATCH: usize = 8;
const SEQUENCE: usize = TOKENS / BATCH;
const HEADS: usize = 4;
const HEAD_DIM: usize = HIDDEN / HEADS;

fn matrix(cpu: &Cpu, rows: usize, cols: usize) -> Matrix {
    let element = |i: usize| ((i * 7919) % 1009) as f32 / 504.5 - 1.0;
    let elements: Vec<f32> = (0..rows * cols).map(element).collect();
    Tensor::from_slice(cpu, rows, cols, &elements).expect("a tensor")
}

fn ints(cpu: &Cpu, rows: usize, cols: usize, f: impl Fn(usize) -> usize) -> Tensor<i32, Cpu> {
    let elements: Vec<i32> = (0..rows * cols).map(|i| f(i) as i32).collect();
    Tensor::from_slice(cpu, rows, cols, &elements).expect("a tensor")
}

macro_rules! mutable {
    ($t:expr) => {
        $t.view_mut().expect("unshared")
    };
}

/// Runs `f` under `name`, with one thread and with two; `work` is floating-point operations, or bytes moved.
fn measure(c: &mut Criterion, name: &str, work: usize, mut f: impl FnMut(&Cpu) -> Box<dyn FnMut() + '_>) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(work as u64)).sample_size(20);
    for threads in [1, 2] {
        let cpu = Cpu::new(threads);
        let mut run = f(&cpu);
        group.bench_function(format!("{threads}"), |b| b.iter(&mut run));
    }
    group.finish();
}

fn products(c: &mut Criterion) {
    for (m, n, k, ta, tb) in [
        (TOKENS, HIDDEN, HIDDEN, Op::N, Op::T),
        (TOKENS, HIDDEN, HIDDEN, Op::N, Op::N),
        (HIDDEN, HIDDEN, TOKENS, Op::T, Op::N),
        (TOKENS, EXPERTS, HIDDEN, Op::N, Op::T),
        (1024, 1024, 1024, Op::N, Op::T),
    ] {
        measure(c, &format!("gemm {m}x{n}x{k} {ta:?}{tb:?}"), 2 * m * n * k, |cpu| {
            let a = if ta == Op::T { matrix(cpu, k, m) } else { matrix(cpu, m, k) };
            let b = if tb == Op::T { matrix(cpu, n, k) } else { matrix(cpu, k, n) };
            let (mut y, cpu) = (matrix(cpu, m, n), cpu.clone());
            Box::new(move || cpu.gemm(mutable!(y), a.view(), ta, b.view(), tb).expect("gemm"))
        });
    }
    let rows = TOKENS * TOP_K;
    for (name, op, from, to) in
        [("forward", Op::T, HIDDEN, 2 * FFN), ("input gradient", Op::N, 2 * FFN, HIDDEN)]
    {
        measure(c, &format!("grouped_gemm {name}"), 2 * rows * from * to, |cpu| {
            let offsets = ints(cpu, 1, EXPERTS + 1, |e| e * rows / EXPERTS);
            let (x, w) = (matrix(cpu, rows, from), matrix(cpu, EXPERTS * 2 * FFN, HIDDEN));
            let (mut y, cpu) = (matrix(cpu, rows, to), cpu.clone());
            Box::new(move || {
                cpu.grouped_gemm(mutable!(y), x.view(), w.view(), op, offsets.view()).expect("grouped_gemm");
            })
        });
    }
    measure(c, "grouped_gemm_acc", 2 * rows * HIDDEN * 2 * FFN, |cpu| {
        let offsets = ints(cpu, 1, EXPERTS + 1, |e| e * rows / EXPERTS);
        let (dy, x) = (matrix(cpu, rows, 2 * FFN), matrix(cpu, rows, HIDDEN));
        let (mut g, cpu) = (matrix(cpu, EXPERTS * 2 * FFN, HIDDEN), cpu.clone());
        Box::new(move || {
            cpu.grouped_gemm_acc(mutable!(g), dy.view(), x.view(), offsets.view()).expect("grouped_gemm_acc");
        })
    });
}

fn attention(c: &mut Criterion) {
    let shape = AttentionShape {
        batch: BATCH,
        q_len: SEQUENCE,
        kv_len: SEQUENCE,
        first_query: 0,
        heads: HEADS,
        kv_heads: HEADS,
        head_dim: HEAD_DIM,
        v_head_dim: HEAD_DIM,
        scale: (HEAD_DIM as f64).powf(-0.5),
        mask: AttentionMask::Causal,
    };
    // Two products forward, five backward, half of each hidden by the mask.
    let product = TOKENS * SEQUENCE * HIDDEN;
    measure(c, "attention", 2 * product, |cpu| {
        let [q, k, v] = [1, 2, 3].map(|_| matrix(cpu, TOKENS, HIDDEN));
        let (mut o, mut lse) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, TOKENS, HEADS));
        let cpu = cpu.clone();
        Box::new(move || {
            cpu.attention(mutable!(o), mutable!(lse), q.view(), k.view(), v.view(), None, &shape)
                .expect("attention");
        })
    });
    // All tokens in one sequence, as one document and as sixteen: tiles that no query sees are skipped.
    let long = AttentionShape { batch: 1, q_len: TOKENS, kv_len: TOKENS, ..shape };
    for documents in [1, 16] {
        measure(c, &format!("attention_of_{documents}_documents"), 2 * TOKENS * TOKENS * HIDDEN, |cpu| {
            let [q, k, v] = [1, 2, 3].map(|_| matrix(cpu, TOKENS, HIDDEN));
            let (mut o, mut lse) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, TOKENS, HEADS));
            let length = TOKENS / documents;
            let (first, cpu) = (ints(cpu, 1, TOKENS, |row| row / length * length), cpu.clone());
            Box::new(move || {
                let (o, lse, first) = (mutable!(o), mutable!(lse), Some(first.view()));
                cpu.attention(o, lse, q.view(), k.view(), v.view(), first, &long).expect("attention");
            })
        });
    }
    measure(c, "attention_backward", 5 * product, |cpu| {
        let [q, k, v, o, d_o] = [1, 2, 3, 4, 5].map(|_| matrix(cpu, TOKENS, HIDDEN));
        let [mut dq, mut dk, mut dv] = [1, 2, 3].map(|_| matrix(cpu, TOKENS, HIDDEN));
        let (lse, cpu) = (matrix(cpu, TOKENS, HEADS), cpu.clone());
        Box::new(move || {
            let (dq, dk, dv) = (mutable!(dq), mutable!(dk), mutable!(dv));
            let (d_o, q, k, v) = (d_o.view(), q.view(), k.view(), v.view());
            cpu.attention_backward(dq, dk, dv, d_o, q, k, v, o.view(), lse.view(), None, &shape)
                .expect("backward");
        })
    });
    measure(c, "rope", TOKENS * HIDDEN, |cpu| {
        let (x, mut y) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, TOKENS, HIDDEN));
        let (cos, sin) = (matrix(cpu, SEQUENCE, HEAD_DIM / 2), matrix(cpu, SEQUENCE, HEAD_DIM / 2));
        let (positions, cpu) = (ints(cpu, 1, TOKENS, |i| i / BATCH), cpu.clone());
        let head = RotaryHead { head_dim: HEAD_DIM, first: 0, pairs: RotaryPairs::Halves };
        Box::new(move || {
            let (cos, sin) = (cos.view(), sin.view());
            cpu.rope(mutable!(y), x.view(), cos, sin, positions.view(), head, Rotation::Forward)
                .expect("rope");
        })
    });
}

fn rowwise(c: &mut Criterion) {
    let rows = TOKENS * TOP_K;
    measure(c, "swiglu", rows * FFN, |cpu| {
        let (x, p, mut y) = (matrix(cpu, rows, 2 * FFN), matrix(cpu, 1, rows), matrix(cpu, rows, FFN));
        let cpu = cpu.clone();
        Box::new(move || cpu.glu(mutable!(y), x.view(), Some(p.view()), GateFunction::Silu).expect("glu"))
    });
    measure(c, "swiglu_backward", rows * FFN, |cpu| {
        let (x, p, dy) = (matrix(cpu, rows, 2 * FFN), matrix(cpu, 1, rows), matrix(cpu, rows, FFN));
        let (mut dx, mut dp, cpu) = (matrix(cpu, rows, 2 * FFN), matrix(cpu, 1, rows), cpu.clone());
        Box::new(move || {
            let (dx, dp) = (mutable!(dx), mutable!(dp));
            cpu.glu_backward(dx, Some(dp), dy.view(), x.view(), Some(p.view()), GateFunction::Silu)
                .expect("glu_backward");
        })
    });
    measure(c, "rms_norm", TOKENS * HIDDEN, |cpu| {
        let (x, w) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, 1, HIDDEN));
        let (mut y, mut rstd, cpu) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, 1, TOKENS), cpu.clone());
        Box::new(move || {
            cpu.rms_norm(mutable!(y), mutable!(rstd), x.view(), w.view(), 1e-5).expect("rms_norm")
        })
    });
    measure(c, "rms_norm_backward", TOKENS * HIDDEN, |cpu| {
        let (x, w, dy) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, 1, HIDDEN), matrix(cpu, TOKENS, HIDDEN));
        let (mut dx, mut dw) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, 1, HIDDEN));
        let (rstd, cpu) = (matrix(cpu, 1, TOKENS), cpu.clone());
        Box::new(move || {
            let (dx, dw) = (mutable!(dx), mutable!(dw));
            cpu.rms_norm_backward(dx, dw, dy.view(), x.view(), w.view(), rstd.view(), None)
                .expect("rms_norm_backward");
        })
    });
    measure(c, "add_assign", TOKENS * HIDDEN, |cpu| {
        let (mut y, x, cpu) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, TOKENS, HIDDEN), cpu.clone());
        Box::new(move || cpu.add_assign(mutable!(y), x.view()).expect("add_assign"))
    });
    measure(c, "gather_rows", rows * HIDDEN, |cpu| {
        let (x, mut y) = (matrix(cpu, TOKENS, HIDDEN), matrix(cpu, rows, HIDDEN));
        let (index, cpu) = (ints(cpu, 1, rows, |i| i * 1021 % TOKENS), cpu.clone());
        Box::new(move || cpu.gather_rows(mutable!(y), x.view(), index.view()).expect("gather_rows"))
    });
    measure(c, "gather_sum", rows * HIDDEN, |cpu| {
        let (x, mut y) = (matrix(cpu, rows, HIDDEN), matrix(cpu, TOKENS, HIDDEN));
        let (index, cpu) = (ints(cpu, TOKENS, TOP_K, |i| i * 1021 % rows), cpu.clone());
        Box::new(move || cpu.gather_sum(mutable!(y), x.view(), index.view()).expect("gather_sum"))
    });
    measure(c, "route", TOKENS * EXPERTS, |cpu| {
        let (logits, mut probs) = (matrix(cpu, TOKENS, EXPERTS), matrix(cpu, TOKENS, EXPERTS));
        let (mut weights, mut lse) = (matrix(cpu, TOKENS, TOP_K), matrix(cpu, 1, TOKENS));
        let (mut experts, cpu) = (ints(cpu, TOKENS, TOP_K, |_| 0), cpu.clone());
        Box::new(move || {
            let (weights, experts) = (mutable!(weights), mutable!(experts));
            let (probs, lse) = (mutable!(probs), mutable!(lse));
            let out = RouteOutput { weights, experts, unbiased: None, probs, lse, margins: None };
            cpu.route(out, RouteInput::new(logits.view()), &ScoreFunction::SoftmaxPost.into())
                .expect("route");
        })
    });
    measure(c, "sort_by_expert", rows, |cpu| {
        let experts = ints(cpu, TOKENS, TOP_K, |i| i * 31 % EXPERTS);
        let (mut order, mut tokens) = (ints(cpu, 1, rows, |_| 0), ints(cpu, 1, rows, |_| 0));
        let (mut position, mut offsets) = (ints(cpu, TOKENS, TOP_K, |_| 0), ints(cpu, 1, EXPERTS + 1, |_| 0));
        let cpu = cpu.clone();
        Box::new(move || {
            let (order, tokens) = (mutable!(order), mutable!(tokens));
            let out = SortOutput { order, tokens, position: mutable!(position), offsets: mutable!(offsets) };
            // The router's type does not matter to the sort.
            Routing::<f32>::sort_by_expert(&cpu, out, experts.view(), None).expect("sort_by_expert");
        })
    });
}

fn vocabulary_and_update(c: &mut Criterion) {
    const VOCABULARY: usize = 512;
    measure(c, "cross_entropy", TOKENS * VOCABULARY, |cpu| {
        let (x, labels) = (matrix(cpu, TOKENS, VOCABULARY), ints(cpu, 1, TOKENS, |i| i % VOCABULARY));
        let (mut lse, mut target, cpu) = (matrix(cpu, 1, TOKENS), matrix(cpu, 1, TOKENS), cpu.clone());
        Box::new(move || {
            cpu.cross_entropy(mutable!(lse), mutable!(target), x.view(), labels.view(), 0)
                .expect("cross_entropy");
        })
    });
    measure(c, "cross_entropy_backward", TOKENS * VOCABULARY, |cpu| {
        let (mut x, labels) = (matrix(cpu, TOKENS, VOCABULARY), ints(cpu, 1, TOKENS, |i| i % VOCABULARY));
        let (lse, scale, cpu) = (matrix(cpu, 1, TOKENS), matrix(cpu, 1, TOKENS), cpu.clone());
        Box::new(move || {
            // In place: after the first time of gradients, which takes as long.
            cpu.cross_entropy_backward(mutable!(x), lse.view(), labels.view(), 0, scale.view())
                .expect("backward");
        })
    });
    let parameters = EXPERTS * 3 * FFN * HIDDEN;
    measure(c, "adamw", parameters, |cpu| {
        let [mut weight, mut m, mut v, g] = [2, 3, 4, 5].map(|_| matrix(cpu, 1, parameters));
        let update =
            AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 10, grad_scale: black_box(1.0) };
        let runs = [AdamWRun { elements: 0..parameters, lr_scale: 1.0, weight_decay: 0.1 }];
        let cpu = cpu.clone();
        Box::new(move || {
            let (weight, m, v) = (mutable!(weight), mutable!(m).into(), mutable!(v).into());
            let slice = AdamWSlice { weight, remainder: None, m, v, grad: g.clone(), runs: &runs };
            Optim::<f32>::adamw(&cpu, vec![slice], &update).expect("adamw");
        })
    });
    measure(c, "dot", parameters, |cpu| {
        let mut out = Tensor::<f64, Cpu>::zeros(cpu, 1, 1).expect("a tensor");
        let (g, cpu) = (matrix(cpu, 1, parameters), cpu.clone());
        Box::new(move || cpu.dot(mutable!(out), g.view(), g.view()).expect("dot"))
    });
}

criterion_group!(benches, products, attention, rowwise, vocabulary_and_update);
criterion_main!(benches);
