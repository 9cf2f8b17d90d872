//! Attention in `bf16` on the first GPU, timed: `cargo run --release -p moe-kernels --features cuda-13000 --example cuda_attention`.
//!
//! A line for each shape: the forward, the backward with the same bits each time and the backward without
//! (`Cuda::set_deterministic`), in milliseconds and TFLOP/s (half of the products counted where attention is causal, and 2.5 forwards for a
//! backward), and the memory that each backward takes beside its operands. Random operands, the median of five groups of launches.
//! `benchmarks/attention.sh` puts PyTorch's times beside them.

use std::time::Instant;

use moe_kernels::family::{Attention, AttentionMask, AttentionShape};
use moe_kernels::{Cuda, Device, Float, Result, Tensor, bf16};

/// Launches between two looks at the clock.
const LAUNCHES: u32 = 10;

fn main() -> Result<()> {
    let gpu = Cuda::new(0)?;
    let cudnn = gpu.cudnn_version().map_or_else(|why| why.to_string(), |version| format!("cuDNN {version}"));
    println!("{}, {cudnn}", gpu.name());
    println!("{:52} forward ms TFLOP/s  backward ms TFLOP/s    MiB  any order ms TFLOP/s    MiB", "");
    for (batch, len, [heads, kv_heads], [head_dim, v_head_dim], mask) in [
        (4, 4096, [32, 8], [128, 128], AttentionMask::Causal),
        (1, 16384, [48, 8], [128, 128], AttentionMask::Causal),
        (4, 4096, [32, 8], [128, 128], AttentionMask::Full),
        (4, 4096, [32, 8], [64, 64], AttentionMask::Causal),
        (2, 4096, [32, 32], [192, 128], AttentionMask::Causal),
        (2, 4096, [32, 32], [96, 96], AttentionMask::Causal),
    ] {
        let scale = (head_dim as f64).sqrt().recip();
        let [q_len, kv_len, first_query] = [len, len, 0];
        measure(
            &gpu,
            &AttentionShape {
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
            },
        )?;
    }
    Ok(())
}

fn measure(gpu: &Cuda, s: &AttentionShape) -> Result<()> {
    let (queries, keys) = (s.q_len * s.batch, s.kv_len * s.batch);
    let q = random::<bf16>(gpu, queries, s.heads * s.head_dim)?;
    let k = random::<bf16>(gpu, keys, s.kv_heads * s.head_dim)?;
    let v = random::<bf16>(gpu, keys, s.kv_heads * s.v_head_dim)?;
    let d_o = random::<bf16>(gpu, queries, s.heads * s.v_head_dim)?;
    let mut o = Tensor::uninit(gpu, queries, s.heads * s.v_head_dim)?;
    let mut lse = Tensor::uninit(gpu, queries, s.heads)?;
    let (mut dq, mut dk, mut dv) = (q.copy(gpu)?, k.copy(gpu)?, v.copy(gpu)?);

    let causal = s.mask != AttentionMask::Full;
    let products = (s.batch * s.heads * s.q_len * s.kv_len * (s.head_dim + s.v_head_dim)) as f64;
    let products = if causal { products } else { 2.0 * products };
    let forward =
        time(gpu, || gpu.attention(o.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), None, s))?;
    let mut backward = |deterministic| -> Result<(f64, usize)> {
        gpu.set_deterministic(deterministic);
        gpu.reset_peak();
        let before = gpu.memory().live;
        let seconds = time(gpu, || {
            let (dq, dk, dv) = (dq.view_mut()?, dk.view_mut()?, dv.view_mut()?);
            let (q, k, v, o) = (q.view(), k.view(), v.view(), o.view());
            gpu.attention_backward(dq, dk, dv, d_o.view(), q, k, v, o, lse.view(), None, s)
        })?;
        Ok((seconds, (gpu.memory().peak - before) >> 20))
    };
    let (ordered, any_order) = (backward(true)?, backward(false)?);
    let size = if s.head_dim == s.v_head_dim {
        s.head_dim.to_string()
    } else {
        format!("{}/{}", s.head_dim, s.v_head_dim)
    };
    let causal = if causal { ", causal" } else { "" };
    let shape = format!("{} x {}, {}/{} heads of {size}{causal}", s.batch, s.q_len, s.heads, s.kv_heads);
    let rate = |seconds: f64| products / seconds / 1e12;
    println!(
        "{shape:52} {:10.3} {:7.0} {:12.3} {:7.0} {:6} {:13.3} {:7.0} {:6}",
        forward * 1e3,
        rate(forward),
        ordered.0 * 1e3,
        2.5 * rate(ordered.0),
        ordered.1,
        any_order.0 * 1e3,
        2.5 * rate(any_order.0),
        any_order.1,
    );
    Ok(())
}

/// Numbers near enough to normal: sums of four uniform ones.
fn random<T: Float>(gpu: &Cuda, rows: usize, cols: usize) -> Result<Tensor<T, Cuda>> {
    let mut state = (rows * 31 + cols) as u64 | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1 << 23) - 1.0
    };
    let some: Vec<T> = (0..(1 << 20) + 7)
        .map(|_| T::from_f64((0..4).map(|_| uniform()).sum::<f64>() * 0.75f64.sqrt()))
        .collect();
    Tensor::from_slice(gpu, rows, cols, &some.iter().copied().cycle().take(rows * cols).collect::<Vec<_>>())
}

/// Seconds of one launch.
fn time(gpu: &Cuda, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..6 {
        gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..LAUNCHES {
            launch()?;
        }
        gpu.synchronize()?;
        times.push(start.elapsed().as_secs_f64() / f64::from(LAUNCHES));
    }
    // The first group has the compilation and the choice of an engine in it.
    let timed = &mut times[1..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[timed.len() / 2])
}
