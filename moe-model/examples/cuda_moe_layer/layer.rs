//! The layer, its sizes and its operands.

use std::time::Instant;

use moe_comm::SoloWorld;
use moe_kernels::random::uniform_pair;
use moe_kernels::{Backend, Device, Float, Layout, Tensor};
use moe_model::axes::communicators;
use moe_model::moe::{MoeMlp, MoeMlpSaved};
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{Cx, Execution, Layer, MicroBatch, Mode, ModelConfig, MoeStats, Objective, RopeTable};
use moe_topology::{Folding, Mapping};

use crate::Error;
use crate::time::median;

/// Sizes of a layer and its input.
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    /// Width of an expert.
    pub inner: usize,
    pub experts: usize,
    pub top_k: usize,
    pub tokens: usize,
}

impl Shape {
    /// Rows of all experts together.
    pub fn rows(&self) -> usize {
        self.tokens * self.top_k
    }

    /// Floating-point operations of the experts' three matrices forward; their input gradients and their weight gradients
    /// are as many each.
    pub fn flops(&self) -> f64 {
        6.0 * self.rows() as f64 * self.hidden as f64 * self.inner as f64
    }

    /// A line of the table; without products `flops` is 0.
    pub fn line(&self, part: &str, seconds: f64, flops: f64) {
        let rate = if flops > 0.0 { format!("{:.0}", flops / seconds / 1e12) } else { String::new() };
        println!("{}\t{part}\t{:.3}\t{rate}", self.name, seconds * 1e3);
    }

    pub fn config(&self) -> Result<ModelConfig, Error> {
        Ok(serde_json::from_value(serde_json::json!({
            "vocab_size": 32, "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k, "router_aux_loss_coef": 0.001
        }))?)
    }
}

/// The layer of one rank that holds all experts, in training.
pub struct MoeLayer<T: Float, D: Device> {
    mlp: MoeMlp,
    pub cx: Cx<T, D>,
}

/// The output, and what backward needs.
type Forward<T, D> = (Tensor<T, D>, MoeMlpSaved<T, D>);

impl<T: Float, D: Backend<T>> MoeLayer<T, D> {
    /// Weights are normal numbers of standard deviation `std`, those of the norm 1.
    pub fn new(device: D, shape: &Shape, std: f64) -> Result<Self, Error> {
        let (folding, config) = (Folding::new(Mapping::default())?, shape.config()?);
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        let mlp = MoeMlp::new(&mut layout, &config, Execution::default(), 0, 0)?;
        let mut params = ParamStore::<T, D>::zeros(layout.build(), &device)?;
        for bucket in 0..params.buckets().len() {
            let layout = params.buckets()[bucket].clone();
            *params.weights_mut(bucket)? = normal(&device, 1, layout.len, std, 3 + bucket as u64)?;
            for norm in layout.parts.iter().filter(|part| part.name.ends_with("layernorm.weight")) {
                let ones = vec![T::from_f64(1.0); norm.len()];
                params.weights_mut(bucket)?.upload(&device, norm.offset, &ones)?;
            }
        }
        let comms = communicators::<D>().build(&SoloWorld::new(device.clone()), &device, &folding)?;
        let rope = RopeTable::of(&device, &config, 1)?;
        let tokens = shape.tokens;
        let objective = Objective { micro_batches: 1, sequences: 1, tokens };
        let mut cx = Cx::new(device, comms, params, rope, objective);
        cx.mode = Mode::Train { seed: 0, step: 1 };
        let (ids, positions) = (vec![0; tokens], Vec::from_iter(0..tokens as i32));
        let weights = vec![1.0; tokens];
        cx.batches = vec![MicroBatch::new(&cx.device, 1, &ids, &positions, &ids, &weights, tokens as f64)?];
        cx.stats.moe = MoeStats::new(&cx.device, vec![0], shape.experts)?;
        Ok(MoeLayer { mlp, cx })
    }

    pub fn forward(&mut self, x: &Tensor<T, D>) -> Result<Forward<T, D>, Error> {
        let (y, saved) = self.mlp.forward(0, x.clone().into(), &mut self.cx)?;
        Ok((y.sum(&self.cx.device)?, saved))
    }

    /// Output and gradient of the input; those of the weights are new, as in the first micro-batch of a step.
    pub fn pass(&mut self, x: &Tensor<T, D>, dy: &Tensor<T, D>) -> Result<[Tensor<T, D>; 2], Error> {
        self.cx.params.zero_grads(false);
        let (y, saved) = self.forward(x)?;
        let (dx, deferred) = self.mlp.backward_input(0, dy.clone(), saved, &mut self.cx)?;
        self.mlp.backward_weight(0, deferred, &mut self.cx)?;
        Ok([y, dx])
    }

    /// Median seconds of the three calls of a pass, each with its end waited for.
    pub fn calls(&mut self, x: &Tensor<T, D>, dy: &Tensor<T, D>) -> Result<[f64; 3], Error> {
        let device = self.cx.device.clone();
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..9 {
            self.cx.params.zero_grads(false);
            let mut start = Instant::now();
            let mut lap = |call: usize| -> Result<(), Error> {
                device.synchronize()?;
                times[call].push(start.elapsed().as_secs_f64());
                start = Instant::now();
                Ok(())
            };
            let (_, saved) = self.forward(x)?;
            lap(0)?;
            let (_, deferred) = self.mlp.backward_input(0, dy.clone(), saved, &mut self.cx)?;
            lap(1)?;
            self.mlp.backward_weight(0, deferred, &mut self.cx)?;
            lap(2)?;
        }
        Ok(times.map(|times| median(times.into_iter())))
    }

    /// The rows of the expert with the most, by the mean of all.
    pub fn imbalance(&self) -> Result<f64, Error> {
        let counts = &self.cx.stats.moe.read(&self.cx.device)?[&0].expert_counts;
        let most = counts.iter().max().copied().unwrap_or_default();
        Ok((most * counts.len() as i64) as f64 / counts.iter().sum::<i64>() as f64)
    }
}

/// Normal numbers of standard deviation `std`. A million of them are drawn, a prime number, and repeated: rows differ, as each
/// begins somewhere else.
pub fn normal<T: Float, D: Device>(
    device: &D,
    rows: usize,
    cols: usize,
    std: f64,
    key: u64,
) -> Result<Tensor<T, D>, Error> {
    const DRAWN: usize = 1_048_583;
    let (len, drawn) = (rows * cols, (rows * cols).min(DRAWN));
    let number = |i: usize| {
        // Box and Muller, 1958.
        let [u, v] = uniform_pair(key, 0, i as u64);
        T::from_f64(std * f64::sqrt(-2.0 * f64::ln(1.0 - u)) * f64::cos(std::f64::consts::TAU * v))
    };
    let part = Tensor::from_slice(device, 1, drawn, &Vec::from_iter((0..drawn).map(number)))?;
    let mut buf = device.alloc(len * size_of::<T>())?;
    for at in (0..len).step_by(drawn.max(1)) {
        let bytes = drawn.min(len - at) * size_of::<T>();
        device.copy(&mut buf, at * size_of::<T>(), part.buf(), 0..bytes)?;
    }
    Ok(Tensor::from_buf(buf.into(), Layout::contiguous(rows, cols))?)
}
