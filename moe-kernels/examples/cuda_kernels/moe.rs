//! What an MoE layer moves, and the router.

use moe_kernels::family::{
    DropLimit, Elementwise, ExpertGroups, Reduce, RouteInput, RouteOutput, Routing, Rows, ScoreFunction,
    Scoring, SortOutput,
};
use moe_kernels::{Cuda, Element, Result, Tensor, bf16};

use crate::bench::Bench;

/// Bytes of an element, and of its accumulation type.
const BF16: usize = 2;
const F32: usize = 4;

pub fn run(bench: &Bench) -> Result<()> {
    for (tokens, experts, k) in [(32768, 128, 8), (32768, 64, 8), (16384, 256, 8)] {
        router(bench, tokens, experts, k)?;
    }
    for (tokens, h, k) in [(32768, 2048, 8), (8192, 7168, 8), (16384, 4096, 2)] {
        exchange(bench, tokens, h, k)?;
    }
    elementwise(bench, 1 << 28)
}

fn blank<E: Element>(bench: &Bench, rows: usize, cols: usize) -> Result<Tensor<E, Cuda>> {
    Tensor::uninit(&bench.gpu, rows, cols)
}

/// `k` different experts for each token.
fn choices(bench: &Bench, tokens: usize, experts: usize, k: usize) -> Result<Tensor<i32, Cuda>> {
    let first = bench.integers(tokens, experts)?.to_vec(&bench.gpu)?;
    let chosen =
        |(i, &e): (usize, &i32)| (0..k).map(move |j| ((e as usize + j * (1 + i % 7)) % experts) as i32);
    let all: Vec<i32> = first.iter().enumerate().flat_map(chosen).collect();
    Tensor::from_slice(&bench.gpu, tokens, k, &all)
}

fn router(bench: &Bench, tokens: usize, experts: usize, k: usize) -> Result<()> {
    let (gpu, shape, one) = (&bench.gpu, format!("{tokens}x{experts} top {k}"), tokens * experts * F32);
    let logits = bench.random::<f32>(tokens, experts)?;
    let [mut weights, mut probs, mut lse] =
        [blank::<f32>(bench, tokens, k)?, blank(bench, tokens, experts)?, blank(bench, 1, tokens)?];
    let mut chosen = blank::<i32>(bench, tokens, k)?;
    let softmax = Scoring::from(ScoreFunction::SoftmaxPre { normalize: true });
    let groups = Some(ExpertGroups { count: 8, kept: 4, score_top_k: 2 });
    let sigmoid = Scoring { groups, ..ScoreFunction::Sigmoid { normalize: true }.into() };
    let (aux, mut dlogits) = (bench.random::<f32>(1, experts)?, blank::<f32>(bench, tokens, experts)?);
    for (name, scoring) in [("softmax", softmax), ("sigmoid_in_groups", sigmoid)] {
        bench.kernel(&format!("route_{name}"), &shape, 2 * one + 2 * tokens * k * F32, || {
            let out = RouteOutput {
                weights: weights.view_mut()?,
                experts: chosen.view_mut()?,
                unbiased: None,
                probs: probs.view_mut()?,
                lse: lse.view_mut()?,
                margins: None,
            };
            gpu.route(out, RouteInput::new(logits.view()), &scoring)
        })?;
        bench.kernel(&format!("route_{name}_backward"), &shape, 2 * one + 2 * tokens * k * F32, || {
            let (d, logits) = (dlogits.view_mut()?, logits.view());
            gpu.route_backward(d, weights.view(), chosen.view(), logits, &scoring, aux.view(), 1e-3)
        })?;
    }
    let mut sums = blank::<f32>(bench, 1, experts)?;
    bench.kernel("column_sums", &shape, one, || gpu.column_sums(sums.view_mut()?, probs.view()))?;

    let chosen = choices(bench, tokens, experts, k)?;
    let (mut order, mut sorted) = (blank(bench, 1, tokens * k)?, blank(bench, 1, tokens * k)?);
    let (mut position, mut offsets) = (blank(bench, tokens, k)?, blank(bench, 1, experts + 1)?);
    bench.kernel("sort_by_expert", &shape, 4 * tokens * k * F32, || {
        let out = SortOutput {
            order: order.view_mut()?,
            tokens: sorted.view_mut()?,
            position: position.view_mut()?,
            offsets: offsets.view_mut()?,
        };
        Routing::<f32>::sort_by_expert(gpu, out, chosen.view(), None)
    })?;
    let slots: Vec<i32> = (0..tokens as i32).collect();
    let (slots, mut kept) = (Tensor::from_slice(gpu, 1, tokens, &slots)?, blank(bench, tokens, k)?);
    let limit = DropLimit { num_experts: experts, unit_slots: tokens, capacity: tokens * k / experts };
    bench.kernel("drop_excess", &shape, 3 * tokens * k * F32, || {
        let (kept, weights) = (kept.view_mut()?, Some(weights.view()));
        gpu.drop_excess(kept, chosen.view(), weights, slots.view(), limit)
    })
}

/// Tokens to the rows of their experts and, summed, back.
fn exchange(bench: &Bench, tokens: usize, h: usize, k: usize) -> Result<()> {
    const EXPERTS: usize = 64;
    let (gpu, shape, bytes) = (&bench.gpu, format!("{tokens}x{k}x{h}"), tokens * (k + 1) * h * BF16);
    let chosen = choices(bench, tokens, EXPERTS, k)?;
    let (mut order, mut sorted) = (blank(bench, 1, tokens * k)?, blank(bench, 1, tokens * k)?);
    let (mut position, mut offsets) = (blank(bench, tokens, k)?, blank(bench, 1, EXPERTS + 1)?);
    let out = SortOutput {
        order: order.view_mut()?,
        tokens: sorted.view_mut()?,
        position: position.view_mut()?,
        offsets: offsets.view_mut()?,
    };
    Routing::<f32>::sort_by_expert(gpu, out, chosen.view(), None)?;
    let x = bench.random::<bf16>(tokens, h)?;
    let (mut rows, mut y) = (blank::<bf16>(bench, tokens * k, h)?, blank::<bf16>(bench, tokens, h)?);
    bench.kernel("gather_rows", &shape, bytes, || {
        gpu.gather_rows(rows.view_mut()?, x.view(), sorted.view())
    })?;
    bench.kernel("gather_sum", &shape, bytes, || gpu.gather_sum(y.view_mut()?, rows.view(), position.view()))
}

fn elementwise(bench: &Bench, n: usize) -> Result<()> {
    let (gpu, shape) = (&bench.gpu, format!("{n}"));
    let (a, b, mut y) =
        (bench.random::<bf16>(1, n)?, bench.random::<bf16>(1, n)?, blank::<bf16>(bench, 1, n)?);
    bench.kernel("add", &shape, 3 * n * BF16, || gpu.add(y.view_mut()?, a.view(), b.view()))?;
    let mut wide = blank::<f32>(bench, 1, n)?;
    bench.kernel("widen", &shape, n * (BF16 + F32), || {
        Elementwise::<bf16>::widen(gpu, wide.view_mut()?, a.view())
    })?;
    bench.kernel("narrow", &shape, n * (BF16 + F32), || gpu.narrow(y.view_mut()?, wide.view()))?;
    let mut sum = Tensor::<f64, Cuda>::zeros(gpu, 1, 1)?;
    bench.kernel("sum_of_squares", &shape, n * F32, || gpu.dot(sum.view_mut()?, wide.view(), wide.view()))
}
