//! The optimizer: one large slice, and all parameters of layers of experts at once.

use moe_kernels::family::{AdamW, AdamWRun, AdamWSlice, MomentMut, Optim, Reduce};
use moe_kernels::{Cuda, Result, Tensor, View, bf16};

use crate::bench::Bench;

/// Bytes of an element of a weight or its remainder, and of everything else.
const BF16: usize = 2;
const F32: usize = 4;

const UPDATE: AdamW = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 10, grad_scale: 1.0 };

pub fn run(bench: &Bench) -> Result<()> {
    one_slice(bench, 1 << 28)?;
    layers(bench, 2)
}

/// Elements that all decay.
fn all(n: usize) -> AdamWRun {
    AdamWRun { elements: 0..n, lr_scale: 1.0, weight_decay: 0.1 }
}

fn zeros<E: moe_kernels::Element>(bench: &Bench, n: usize) -> Result<Tensor<E, Cuda>> {
    Tensor::zeros(&bench.gpu, 1, n)
}

fn one_slice(bench: &Bench, n: usize) -> Result<()> {
    let (gpu, shape, runs) = (&bench.gpu, format!("{n}"), [all(n)]);
    let (grad, mut weight, mut remainder) =
        (bench.random::<f32>(1, n)?, bench.random::<bf16>(1, n)?, zeros::<u16>(bench, n)?);
    let [mut m, mut v] = [zeros::<f32>(bench, n)?, zeros(bench, n)?];
    bench.kernel("adamw", &shape, n * (5 * F32 + 4 * BF16), || {
        let (weight, remainder) = (weight.view_mut()?, Some(remainder.view_mut()?));
        let (m, v) = (m.view_mut()?.into(), v.view_mut()?.into());
        gpu.adamw(vec![AdamWSlice { weight, remainder, m, v, grad: grad.clone(), runs: &runs }], &UPDATE)
    })?;
    let [mut m, mut v] = [zeros::<bf16>(bench, n)?, zeros(bench, n)?];
    bench.kernel("adamw_moments_in_bf16", &shape, n * (F32 + 8 * BF16), || {
        let (weight, remainder) = (weight.view_mut()?, Some(remainder.view_mut()?));
        let (m, v) = (MomentMut::Bf16(m.view_mut()?), MomentMut::Bf16(v.view_mut()?));
        gpu.adamw(vec![AdamWSlice { weight, remainder, m, v, grad: grad.clone(), runs: &runs }], &UPDATE)
    })
}

/// What is kept of one slice.
struct Slice {
    weight: Tensor<bf16, Cuda>,
    remainder: Tensor<u16, Cuda>,
    moments: [Tensor<f32, Cuda>; 2],
    grad: Tensor<f32, Cuda>,
    /// Elements of each tensor.
    tensors: Vec<usize>,
    runs: Vec<AdamWRun>,
}

impl Slice {
    fn new(bench: &Bench, matrices: Vec<usize>, vectors: Vec<usize>) -> Result<Self> {
        let [decayed, others] = [&matrices, &vectors].map(|tensors| tensors.iter().sum::<usize>());
        let n = decayed + others;
        Ok(Slice {
            weight: bench.random(1, n)?,
            remainder: zeros(bench, n)?,
            moments: [zeros(bench, n)?, zeros(bench, n)?],
            grad: bench.random(1, n)?,
            tensors: [matrices, vectors].concat(),
            runs: vec![all(decayed), AdamWRun { elements: decayed..n, lr_scale: 1.0, weight_decay: 0.0 }],
        })
    }

    fn slice_mut(&mut self) -> Result<AdamWSlice<'_, bf16, Cuda>> {
        let [m, v] = &mut self.moments;
        Ok(AdamWSlice {
            weight: self.weight.view_mut()?,
            remainder: Some(self.remainder.view_mut()?),
            m: m.view_mut()?.into(),
            v: v.view_mut()?.into(),
            grad: self.grad.clone(),
            runs: &self.runs,
        })
    }

    /// The gradient of each tensor.
    fn pieces(&self) -> impl Iterator<Item = Result<View<'_, f32, Cuda>>> {
        let mut start = 0;
        self.tensors.iter().map(move |n| {
            start += n;
            self.grad.view().columns(start - n..start)
        })
    }
}

/// Layers of Qwen3-30B-A3B: a slice for what is dense in each, and one for its experts.
fn layers(bench: &Bench, layers: usize) -> Result<()> {
    let (gpu, h) = (&bench.gpu, 2048);
    let [queries, keys, experts, width] = [4096, 512, 128, 768];
    let dense = vec![h * queries, h * keys, h * keys, h * queries, h * experts];
    let mut slices = Vec::new();
    for _ in 0..layers {
        slices.push(Slice::new(bench, dense.clone(), vec![h, h, 128, 128])?);
        slices.push(Slice::new(bench, vec![h * width; 3 * experts], Vec::new())?);
    }
    let n: usize = slices.iter().flat_map(|slice| &slice.tensors).sum();
    let shape = format!("{layers} layers of Qwen3-30B-A3B");
    bench.kernel("adamw", &shape, n * (5 * F32 + 4 * BF16), || {
        gpu.adamw(slices.iter_mut().map(Slice::slice_mut).collect::<Result<_>>()?, &UPDATE)
    })?;
    let pieces = slices.iter().flat_map(Slice::pieces).collect::<Result<Vec<_>>>()?;
    let pieces: Vec<_> = pieces.into_iter().enumerate().collect();
    let mut squares = zeros::<f64>(bench, pieces.len())?;
    bench.kernel("sums_of_squares", &shape, n * F32, || gpu.sums_of_squares(squares.view_mut()?, &pieces))
}
