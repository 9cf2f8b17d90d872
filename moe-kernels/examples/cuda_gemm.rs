//! Dense matrix products on the first GPU, timed: `cargo run --release -p moe-kernels --features cuda-13000 --example cuda_gemm`.
//!
//! One line for each: forward `x · wᵀ`, its gradient `dy · w`, and the weight gradient `dyᵀ · x` added to what is there in `f32`;
//! random operands, the median of five groups of launches.

use std::time::Instant;

use moe_kernels::family::{Gemm, Op};
use moe_kernels::{Cuda, Device, Float, Layout, Result, Tensor, View, bf16};

/// Launches between two looks at the clock.
const LAUNCHES: u32 = 10;

fn main() -> Result<()> {
    let gpu = Cuda::new(0)?;
    println!("{}", gpu.name());
    for [tokens, inputs, outputs] in [
        [8192, 8192, 8192],
        [16384, 4096, 6144],
        [16384, 4096, 14336],
        [8192, 2048, 151_936],
        [4096, 2048, 128],
    ] {
        products::<bf16>(&gpu, [tokens, inputs, outputs], 0)?;
    }
    products::<bf16>(&gpu, [4096, 4096, 4096], 1)?;
    products::<f32>(&gpu, [4096, 4096, 4096], 0)?;
    products::<f64>(&gpu, [4096, 4096, 4096], 0)
}

/// Numbers that a product cannot be fast on by chance: in [−1, 1), all bits in use.
fn random<T: Float>(gpu: &Cuda, rows: usize, cols: usize) -> Result<Tensor<T, Cuda>> {
    let mut state = (rows * 31 + cols) as u64 | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        T::from_f64((state >> 40) as f64 / f64::from(1 << 23) - 1.0)
    };
    let some: Vec<T> = (0..(1 << 20) + 7).map(|_| draw()).collect();
    Tensor::from_slice(gpu, rows, cols, &some.iter().copied().cycle().take(rows * cols).collect::<Vec<_>>())
}

/// The three products of a linear layer, whose operands begin `shift` elements into rows that are 8 longer.
fn products<T: Float>(gpu: &Cuda, [tokens, inputs, outputs]: [usize; 3], shift: usize) -> Result<()> {
    let room = if shift == 0 { 0 } else { 8 };
    let operand = |rows, cols| random::<T>(gpu, rows, cols + room);
    let (x, w, dy) = (operand(tokens, inputs)?, operand(outputs, inputs)?, operand(tokens, outputs)?);
    let (mut y, mut dx) = (operand(tokens, outputs)?, operand(tokens, inputs)?);
    let mut dw = Tensor::<T::Acc, Cuda>::zeros(gpu, outputs, inputs)?;
    let (xv, wv, dyv) = (inner(&x, inputs, shift)?, inner(&w, inputs, shift)?, inner(&dy, outputs, shift)?);
    let flops = 2.0 * tokens as f64 * inputs as f64 * outputs as f64;
    let forward =
        time(gpu, || gpu.gemm(y.view_mut()?.columns(shift..shift + outputs)?, xv, Op::N, wv, Op::T))?;
    let input =
        time(gpu, || gpu.gemm(dx.view_mut()?.columns(shift..shift + inputs)?, dyv, Op::N, wv, Op::N))?;
    let weight = time(gpu, || gpu.gemm_acc(dw.view_mut()?, dyv, Op::T, xv, Op::N))?;
    let [forward, input, weight] = [forward, input, weight].map(|seconds| flops / seconds / 1e12);
    println!(
        "{:5} {tokens:6} x {inputs:5} x {outputs:5}{}: {forward:6.1} {input:6.1} {weight:6.1} TFLOP/s",
        T::DTYPE.name(),
        if shift == 0 { "" } else { ", at odd places" },
    );
    Ok(())
}

fn inner<T: Float>(m: &Tensor<T, Cuda>, cols: usize, shift: usize) -> Result<View<'_, T, Cuda>> {
    let Layout { rows, stride, .. } = m.layout();
    View::new(m.buf().as_ref(), Layout { offset: shift, rows, cols, stride })
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
    // The first group has the compilation and the choice of an algorithm in it.
    let timed = &mut times[1..];
    timed.sort_by(f64::total_cmp);
    Ok(timed[timed.len() / 2])
}
