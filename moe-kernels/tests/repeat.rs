//! The same call gives the same bits: again, and on any number of threads.

use moe_kernels::family::{
    Activation, AdamW, AdamWRun, AdamWSlice, Attention, AttentionMask, AttentionShape, Elementwise,
    Embedding, GateFunction, Gemm, GroupedGemm, Loss, Norm, Op, Optim, Reduce, RouteInput, RouteOutput,
    Routing, ScoreFunction,
};
use moe_kernels::{Cpu, Element, Result, Tensor};

type Matrix = Tensor<f32, Cpu>;

/// Every result of a run, by name.
#[derive(Default)]
struct Bits(Vec<(&'static str, Vec<u8>)>);

impl Bits {
    fn keep<T: Element>(&mut self, cpu: &Cpu, what: &'static str, t: &Tensor<T, Cpu>) -> Result<()> {
        let elements = t.to_vec(cpu)?;
        self.0.push((what, elements.iter().flat_map(bytemuck::bytes_of).copied().collect()));
        Ok(())
    }
}

/// Elements whose sums round: the order of additions shows.
fn matrix(cpu: &Cpu, rows: usize, cols: usize, seed: u32) -> Result<Matrix> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut element = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    let elements: Vec<f32> = (0..rows * cols).map(|_| element()).collect();
    Tensor::from_slice(cpu, rows, cols, &elements)
}

fn ints(cpu: &Cpu, rows: usize, cols: usize, f: impl Fn(usize) -> usize) -> Result<Tensor<i32, Cpu>> {
    let elements: Vec<i32> = (0..rows * cols).map(|i| f(i) as i32).collect();
    Tensor::from_slice(cpu, rows, cols, &elements)
}

/// Kernels that sum, in shapes of several pieces of work.
fn run(cpu: &Cpu) -> Result<Bits> {
    let mut bits = Bits::default();
    let (n, h) = (900, 130);
    let (x, dy) = (matrix(cpu, n, h, 1)?, matrix(cpu, n, h, 2)?);
    let (square, w) = (matrix(cpu, h, h, 3)?, matrix(cpu, 1, h, 4)?);

    let mut y = matrix(cpu, n, h, 0)?;
    cpu.gemm(y.view_mut()?, x.view(), Op::N, square.view(), Op::T)?;
    bits.keep(cpu, "gemm", &y)?;
    let mut g = matrix(cpu, 260, 530, 5)?;
    let (a, b) = (matrix(cpu, n, 260, 6)?, matrix(cpu, n, 530, 7)?);
    cpu.gemm_acc(g.view_mut()?, a.view(), Op::T, b.view(), Op::N)?;
    bits.keep(cpu, "gemm_acc", &g)?;

    let offsets = Tensor::from_slice(cpu, 1, 5, &[0, 3, 3, 620, 900])?;
    let weights = matrix(cpu, 4 * h, h, 8)?;
    cpu.grouped_gemm(y.view_mut()?, x.view(), weights.view(), Op::T, offsets.view())?;
    bits.keep(cpu, "grouped_gemm", &y)?;
    let mut g = matrix(cpu, 4 * h, h, 9)?;
    cpu.grouped_gemm_acc(g.view_mut()?, dy.view(), x.view(), offsets.view())?;
    bits.keep(cpu, "grouped_gemm_acc", &g)?;

    let (mut rstd, mut dw) = (matrix(cpu, 1, n, 0)?, matrix(cpu, 1, h, 10)?);
    cpu.rms_norm(y.view_mut()?, rstd.view_mut()?, x.view(), w.view(), 1e-5)?;
    bits.keep(cpu, "rms_norm", &y)?;
    let (dx, past) = (y.view_mut()?, Some(x.view()));
    cpu.rms_norm_backward(dx, dw.view_mut()?, dy.view(), x.view(), w.view(), rstd.view(), past)?;
    bits.keep(cpu, "rms_norm_backward", &y)?;
    bits.keep(cpu, "dw", &dw)?;

    let shape = AttentionShape {
        batch: 3,
        q_len: 150,
        kv_len: 150,
        first_query: 0,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        v_head_dim: 16,
        scale: 0.25,
        mask: AttentionMask::Causal,
    };
    let (q, k, v) = (matrix(cpu, 450, 64, 11)?, matrix(cpu, 450, 32, 12)?, matrix(cpu, 450, 32, 13)?);
    let (mut o, mut lse, d_o) =
        (matrix(cpu, 450, 64, 0)?, matrix(cpu, 450, 4, 0)?, matrix(cpu, 450, 64, 14)?);
    cpu.attention(o.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), None, &shape)?;
    bits.keep(cpu, "attention", &o)?;
    bits.keep(cpu, "attention lse", &lse)?;
    let (mut dq, mut dk, mut dv) =
        (matrix(cpu, 450, 64, 0)?, matrix(cpu, 450, 32, 0)?, matrix(cpu, 450, 32, 0)?);
    let (dq_view, dk_view, dv_view) = (dq.view_mut()?, dk.view_mut()?, dv.view_mut()?);
    let (q, k, v) = (q.view(), k.view(), v.view());
    cpu.attention_backward(
        dq_view,
        dk_view,
        dv_view,
        d_o.view(),
        q,
        k,
        v,
        o.view(),
        lse.view(),
        None,
        &shape,
    )?;
    bits.keep(cpu, "dq", &dq)?;
    bits.keep(cpu, "dk", &dk)?;
    bits.keep(cpu, "dv", &dv)?;

    let (p, gate_up) = (matrix(cpu, 1, n, 15)?, matrix(cpu, n, 2 * h, 16)?);
    let (mut dp, mut dgate_up) = (matrix(cpu, 1, n, 0)?, matrix(cpu, n, 2 * h, 0)?);
    cpu.glu_backward(
        dgate_up.view_mut()?,
        Some(dp.view_mut()?),
        dy.view(),
        gate_up.view(),
        Some(p.view()),
        GateFunction::Silu,
    )?;
    bits.keep(cpu, "dp", &dp)?;
    bits.keep(cpu, "dgate_up", &dgate_up)?;

    let index = ints(cpu, n, 3, |i| i * 677 % n)?;
    cpu.gather_sum(y.view_mut()?, x.view(), index.view())?;
    bits.keep(cpu, "gather_sum", &y)?;
    let (ids, mut dtable) = (ints(cpu, 1, n, |i| i * i % 300)?, matrix(cpu, 300, h, 17)?);
    cpu.embed_backward(dtable.view_mut()?, dy.view(), ids.view(), 0, None)?;
    bits.keep(cpu, "embed_backward", &dtable)?;

    let (mut lse, mut target) = (matrix(cpu, 1, n, 0)?, matrix(cpu, 1, n, 0)?);
    cpu.cross_entropy(lse.view_mut()?, target.view_mut()?, x.view(), ids.view(), 0)?;
    bits.keep(cpu, "cross_entropy", &lse)?;

    let (mut weights, mut probs) = (matrix(cpu, n, 2, 0)?, matrix(cpu, n, h, 0)?);
    let mut experts = ints(cpu, n, 2, |_| 0)?;
    let out = RouteOutput {
        weights: weights.view_mut()?,
        experts: experts.view_mut()?,
        unbiased: None,
        probs: probs.view_mut()?,
        lse: lse.view_mut()?,
        margins: None,
    };
    cpu.route(out, RouteInput::new(x.view()), &ScoreFunction::SoftmaxPost.into())?;
    bits.keep(cpu, "weights", &weights)?;
    bits.keep(cpu, "experts", &experts)?;

    let flat = 70_001;
    let mut weight = matrix(cpu, 1, flat, 19)?;
    let (mut m, mut v) = (matrix(cpu, 1, flat, 20)?, Tensor::<f32, Cpu>::zeros(cpu, 1, flat)?);
    let grad = matrix(cpu, 1, flat, 21)?;
    let update = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, grad_scale: 0.5 };
    let slice = AdamWSlice {
        weight: weight.view_mut()?,
        remainder: None,
        m: m.view_mut()?.into(),
        v: v.view_mut()?.into(),
        grad: grad.clone(),
        runs: &[AdamWRun { elements: 0..flat, lr_scale: 1.0, weight_decay: 0.1 }],
    };
    cpu.adamw(vec![slice], &update)?;
    bits.keep(cpu, "adamw", &weight)?;

    let mut out = Tensor::<f64, Cpu>::zeros(cpu, 1, 1)?;
    cpu.dot(out.view_mut()?, grad.view(), weight.view())?;
    cpu.dot(out.view_mut()?, x.view(), dy.view())?;
    bits.keep(cpu, "dot", &out)?;
    let mut sums = matrix(cpu, 1, h, 0)?;
    cpu.column_sums(sums.view_mut()?, x.view())?;
    bits.keep(cpu, "column_sums", &sums)?;
    Ok(bits)
}

#[test]
fn bits_are_the_same_again_and_on_any_number_of_threads() -> Result<()> {
    let want = run(&Cpu::new(1))?;
    for threads in [1, 2, 2, 3, 7] {
        let cpu = Cpu::new(threads);
        for _ in 0..2 {
            for ((what, got), (_, want)) in run(&cpu)?.0.iter().zip(&want.0) {
                assert!(got == want, "{what} differs on {threads} threads");
            }
        }
    }
    Ok(())
}
