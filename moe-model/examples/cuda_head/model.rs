//! A head on one rank, its sizes and its operands.

use moe_comm::SoloWorld;
use moe_kernels::random::uniform_pair;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_model::axes::communicators;
use moe_model::head::Head;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{Cx, LossSum, MicroBatch, ModelConfig, Objective, PipelineLayout, RopeTable};
use moe_topology::{Folding, Mapping};

use crate::Error;

/// Sizes of a head and its input.
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub vocab: usize,
    pub tokens: usize,
}

/// A head with the whole vocabulary, in training.
pub struct HeadModel<T: Float, D: Device> {
    head: Head,
    pub cx: Cx<T, D>,
}

impl<T: Float, D: Backend<T>> HeadModel<T, D> {
    /// With starting weights; gradients are 0. A loss weight is 1, and 0 for every eighth token.
    pub fn new(device: D, shape: &Shape) -> Result<Self, Error> {
        let &Shape { hidden, vocab, tokens, .. } = shape;
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 1, "num_experts_per_tok": 1
        }))?;
        let folding = Folding::new(Mapping::default())?;
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        let head = Head::new(&mut layout, &config, &PipelineLayout::even(1, 1, 1)?)?;
        let mut params = ParamStore::<T, D>::new(layout.build(), 1, &device)?;
        params.zero_grads(false);
        let comms = communicators::<D>().build(&SoloWorld::new(device.clone()), &device, &folding)?;
        let rope = RopeTable::of(&device, &config, 1)?;
        let objective = Objective { micro_batches: 1, sequences: 1, tokens };
        let mut cx = Cx::new(device, comms, params, rope, objective);
        let positions = Vec::from_iter(0..tokens as i32);
        let labels: Vec<i32> = (0..tokens).map(|i| (i * 7919 % vocab) as i32).collect();
        let weights: Vec<f64> = (0..tokens).map(|i| f64::from(u8::from(i % 8 > 0))).collect();
        let total = weights.iter().sum();
        cx.batches = vec![MicroBatch::new(&cx.device, 1, &labels, &positions, &labels, &weights, total)?];
        Ok(HeadModel { head, cx })
    }

    /// The loss alone.
    pub fn loss(&mut self, x: &Tensor<T, D>) -> Result<(), Error> {
        self.cx.stats.loss = LossSum::default();
        Ok(self.head.loss(0, x.clone(), &mut self.cx)?)
    }

    /// The loss and the gradient of the input; those of the weights are added to what is there.
    pub fn backward(&mut self, x: &Tensor<T, D>) -> Result<Tensor<T, D>, Error> {
        self.cx.stats.loss = LossSum::default();
        Ok(self.head.backward(0, x.clone(), &mut self.cx)?)
    }
}

/// An input: numbers of mean square 1, each as likely as any other. Those of 1,048,583 elements (a prime number) come again.
pub fn input<T: Float, D: Device>(device: &D, shape: &Shape) -> Result<Tensor<T, D>, Error> {
    let len = shape.tokens * shape.hidden;
    let uniform = |i: usize| uniform_pair(1, 0, i as u64)[0];
    let drawn: Vec<T> =
        (0..len.min(1_048_583)).map(|i| T::from_f64(f64::sqrt(3.0) * (2.0 * uniform(i) - 1.0))).collect();
    let all: Vec<T> = drawn.iter().copied().cycle().take(len).collect();
    Ok(Tensor::from_slice(device, shape.tokens, shape.hidden, &all)?)
}
