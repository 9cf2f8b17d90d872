//! What every Transformer does besides its products: normalisation, positions, activations, embedding, loss.

use moe_kernels::family::{
    Activation, Embedding, GateFunction, Loss, Norm, Rope, RotaryHead, RotaryPairs, Rotation,
};
use moe_kernels::{Cuda, Result, Tensor, bf16};

use crate::bench::Bench;

/// Bytes of an element, and of its accumulation type.
const BF16: usize = 2;
const F32: usize = 4;

pub fn run(bench: &Bench) -> Result<()> {
    for (n, h) in [(32768, 2048), (16384, 4096), (8192, 8192), (262_144, 128)] {
        norm(bench, n, h)?;
    }
    for (n, heads) in [(32768, 32), (65536, 4)] {
        rope(bench, n, heads)?;
    }
    for heads in [32, 4] {
        norm_rope(bench, 32768, heads)?;
    }
    for (n, width) in [(131_072, 768), (65536, 1024), (8192, 14336)] {
        swiglu(bench, n, width)?;
    }
    for (n, vocabulary) in [(8192, 151_936), (16384, 32000)] {
        cross_entropy(bench, n, vocabulary)?;
    }
    for (n, h, vocabulary) in [(32768, 2048, 151_936), (32768, 4096, 32000)] {
        embedding(bench, n, h, vocabulary)?;
    }
    Ok(())
}

fn zeros(bench: &Bench, rows: usize, cols: usize) -> Result<Tensor<f32, Cuda>> {
    Tensor::zeros(&bench.gpu, rows, cols)
}

fn norm(bench: &Bench, n: usize, h: usize) -> Result<()> {
    let (gpu, shape, one) = (&bench.gpu, format!("{n}x{h}"), n * h * BF16);
    let (x, dy, past) =
        (bench.random::<bf16>(n, h)?, bench.random::<bf16>(n, h)?, bench.random::<bf16>(n, h)?);
    let w = bench.random::<bf16>(1, h)?;
    let (mut y, mut rstd, mut dw) = (Tensor::uninit(gpu, n, h)?, zeros(bench, 1, n)?, zeros(bench, 1, h)?);
    bench.kernel("rms_norm", &shape, 2 * one, || {
        gpu.rms_norm(y.view_mut()?, rstd.view_mut()?, x.view(), w.view(), 1e-6)
    })?;
    let mut sum = Tensor::uninit(gpu, n, h)?;
    bench.kernel("rms_norm_residual", &shape, 4 * one, || {
        let (sum, y, rstd) = (sum.view_mut()?, y.view_mut()?, rstd.view_mut()?);
        gpu.add_rms_norm(sum, y, rstd, x.view(), past.view(), w.view(), 1e-6)
    })?;
    for (name, passes, past) in
        [("rms_norm_backward", 3, None), ("rms_norm_backward_residual", 4, Some(past.view()))]
    {
        bench.kernel(name, &shape, passes * one, || {
            let (dx, dw, dy) = (y.view_mut()?, dw.view_mut()?, dy.view());
            gpu.rms_norm_backward(dx, dw, dy, x.view(), w.view(), rstd.view(), past)
        })?;
    }
    Ok(())
}

const HEAD_DIM: usize = 128;
const POSITIONS: usize = 8192;

fn positions(bench: &Bench, n: usize) -> Result<Tensor<i32, Cuda>> {
    let positions: Vec<i32> = (0..n).map(|i| (i % POSITIONS) as i32).collect();
    Tensor::from_slice(&bench.gpu, 1, n, &positions)
}

fn rope(bench: &Bench, n: usize, heads: usize) -> Result<()> {
    let (gpu, shape) = (&bench.gpu, format!("{n}x{heads}x{HEAD_DIM}"));
    let x = bench.random::<bf16>(n, heads * HEAD_DIM)?;
    let (cos, sin) =
        (bench.random::<f32>(POSITIONS, HEAD_DIM / 2)?, bench.random::<f32>(POSITIONS, HEAD_DIM / 2)?);
    let positions = positions(bench, n)?;
    let mut y = Tensor::uninit(gpu, n, heads * HEAD_DIM)?;
    for (name, pairs) in [("rope_halves", RotaryPairs::Halves), ("rope_adjacent", RotaryPairs::Adjacent)] {
        let head = RotaryHead { head_dim: HEAD_DIM, first: 0, pairs };
        bench.kernel(name, &shape, 2 * n * heads * HEAD_DIM * BF16, || {
            let (y, positions) = (y.view_mut()?, positions.view());
            gpu.rope(y, x.view(), cos.view(), sin.view(), positions, head, Rotation::Forward)
        })?;
    }
    Ok(())
}

/// Queries or keys of a model with QK-norm.
fn norm_rope(bench: &Bench, n: usize, heads: usize) -> Result<()> {
    let (gpu, shape, width) = (&bench.gpu, format!("{n}x{heads}x{HEAD_DIM}"), heads * HEAD_DIM);
    let (x, dy, w) = (
        bench.random::<bf16>(n, width)?,
        bench.random::<bf16>(n, width)?,
        bench.random::<bf16>(1, HEAD_DIM)?,
    );
    let (cos, sin) =
        (bench.random::<f32>(POSITIONS, HEAD_DIM / 2)?, bench.random::<f32>(POSITIONS, HEAD_DIM / 2)?);
    let positions = positions(bench, n)?;
    let (mut y, mut rstd, mut dw) =
        (Tensor::uninit(gpu, n, width)?, zeros(bench, 1, n * heads)?, zeros(bench, 1, HEAD_DIM)?);
    let head = RotaryHead { head_dim: HEAD_DIM, first: 0, pairs: RotaryPairs::Halves };
    bench.kernel("qk_norm_rope", &shape, 2 * n * width * BF16, || {
        let (y, rstd, cos, sin) = (y.view_mut()?, rstd.view_mut()?, cos.view(), sin.view());
        gpu.rms_norm_rope(y, rstd, x.view(), w.view(), cos, sin, positions.view(), head, 1e-6)
    })?;
    bench.kernel("qk_norm_rope_backward", &shape, 3 * n * width * BF16, || {
        let (dx, dw, dy, x, w) = (y.view_mut()?, dw.view_mut()?, dy.view(), x.view(), w.view());
        let (rstd, cos, sin, positions) = (rstd.view(), cos.view(), sin.view(), positions.view());
        gpu.rms_norm_rope_backward(dx, dw, dy, x, w, rstd, cos, sin, positions, head)
    })
}

fn swiglu(bench: &Bench, n: usize, width: usize) -> Result<()> {
    let (gpu, shape, one) = (&bench.gpu, format!("{n}x{width}"), n * width * BF16);
    let (gate_up, dy) = (bench.random::<bf16>(n, 2 * width)?, bench.random::<bf16>(n, width)?);
    let (p, mut dp) = (bench.random::<f32>(1, n)?, zeros(bench, 1, n)?);
    let (mut y, mut d) = (Tensor::uninit(gpu, n, width)?, Tensor::uninit(gpu, n, 2 * width)?);
    bench.kernel("swiglu", &shape, 3 * one, || {
        gpu.glu(y.view_mut()?, gate_up.view(), Some(p.view()), GateFunction::Silu)
    })?;
    bench.kernel("swiglu_backward", &shape, 5 * one, || {
        let (d, dp) = (d.view_mut()?, Some(dp.view_mut()?));
        gpu.glu_backward(d, dp, dy.view(), gate_up.view(), Some(p.view()), GateFunction::Silu)
    })
}

fn cross_entropy(bench: &Bench, n: usize, vocabulary: usize) -> Result<()> {
    let (gpu, shape, one) = (&bench.gpu, format!("{n}x{vocabulary}"), n * vocabulary * BF16);
    let (mut logits, labels) = (bench.random::<bf16>(n, vocabulary)?, bench.integers(n, vocabulary)?);
    let (mut lse, mut target, scale) = (zeros(bench, 1, n)?, zeros(bench, 1, n)?, bench.random::<f32>(1, n)?);
    bench.kernel("cross_entropy", &shape, one, || {
        gpu.cross_entropy(lse.view_mut()?, target.view_mut()?, logits.view(), labels.view(), 0)
    })?;
    // In place: what later runs get are gradients, which are as much work.
    bench.kernel("cross_entropy_backward", &shape, 2 * one, || {
        gpu.cross_entropy_backward(logits.view_mut()?, lse.view(), labels.view(), 0, scale.view())
    })?;
    bench.kernel("cross_entropy_whole", &shape, 2 * one, || {
        let (lse, target, logits) = (lse.view_mut()?, target.view_mut()?, logits.view_mut()?);
        gpu.cross_entropy_whole(lse, target, logits, labels.view(), scale.view())
    })
}

fn embedding(bench: &Bench, n: usize, h: usize, vocabulary: usize) -> Result<()> {
    let (gpu, shape, one) = (&bench.gpu, format!("{n}x{h} of {vocabulary}"), n * h * BF16);
    let (table, dy) = (bench.random::<bf16>(vocabulary, h)?, bench.random::<bf16>(n, h)?);
    let ids = words(n, vocabulary);
    let mut distinct = ids.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let ids = Tensor::from_slice(gpu, 1, n, &ids)?;
    let (mut y, mut dtable) = (Tensor::uninit(gpu, n, h)?, zeros(bench, vocabulary, h)?);
    bench.kernel("embed", &shape, 2 * one, || gpu.embed(y.view_mut()?, table.view(), ids.view(), 0))?;
    // Rows of the table's gradient are read and written once for each id.
    bench.kernel("embed_backward", &shape, one + 2 * distinct.len() * h * F32, || {
        gpu.embed_backward(dtable.view_mut()?, dy.view(), ids.view(), 0, None)
    })
}

/// Ids as unequally frequent as those of text: the word of rank r with a frequency of about 1/r (Zipf).
fn words(n: usize, vocabulary: usize) -> Vec<i32> {
    let uniform = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) as f64 / u64::MAX as f64;
    (0..n).map(|i| ((vocabulary as f64).powf(uniform(i + 1)) as i32 - 1).min(vocabulary as i32 - 1)).collect()
}
