//! A forward and a backward pass through stages, woven so that rows travel while the other pass computes.
//!
//! Starts and waits move rows and compute nothing besides, with one exception: where experts are spread over EP and sliced over ETP, the
//! leg over ETP is waited for within them ([`AllToAll`](moe_dispatch::AllToAll)), so that the one over EP alone is hidden. Nor is hidden
//! what compute steps wait for: the exchange of counts (of attention and router) and the second dispatch of a layer that is made again
//! (of the gradient of the experts).

use std::collections::BTreeMap;
use std::sync::Arc;

use moe_kernels::{Backend, Device, Float, Tensor};
use moe_pipeline::StageCost;
use moe_pipeline::weave::{LayerCost, Order, Part, Phase, Step, Task, weave};

use super::{DecoderStage, SavedBlock, StageSaved};
use crate::attention::SelfAttention;
use crate::block::{Block, Either, Mlp};
use crate::layer::{Hidden, Layer};
use crate::moe::steps::{ByRows, Chosen, ExpertsDeferred, ExpertsSaved, InFlight, SharedDeferred, TokenSide};
use crate::moe::{MoeMlp, Routed, Rows};
use crate::recompute::{Recompute, RecomputeSaved};
use crate::transport::Activation;
use crate::{Cx, Error, Result};

/// The orders in which a stage's forward passes are woven with backward passes, by the stage of these.
pub type Orders = BTreeMap<usize, Arc<Order>>;

/// What a layer is taken to cost, as nothing is measured: attention, experts and either half of a dense layer 1, an all-to-all 1.5. In
/// equal layers of experts computes and all-to-alls then take equally long, and an order that hides the most of these hides the
/// most of shorter and of longer ones too ([`moe_pipeline::weave`]).
fn cost(block: &Block) -> LayerCost {
    let all = |time| StageCost { forward: time, backward_input: time, backward_weight: time };
    match block.mlp.layer {
        Mlp::Moe(_) => LayerCost::Moe { attention: all(1.0), experts: all(1.0), all_to_all: 1.5 },
        Mlp::Dense(_) => LayerCost::Dense(all(2.0)),
    }
}

impl DecoderStage {
    /// Makes the orders in which the stages of a rank overlap: a forward pass through any of them and a backward pass through any of
    /// them, layer by layer. Stages without orders run one pass after the other. A search takes milliseconds for dozens of layers; stages
    /// of the same layers share it.
    ///
    /// # Errors
    /// Those of [`moe_pipeline::weave::weave`], which no layers here give cause for.
    pub fn weave(stages: &mut [DecoderStage]) -> Result<()> {
        let mut made: Vec<Arc<Order>> = Vec::new();
        let mut of_stages = Vec::with_capacity(stages.len());
        for stage in &*stages {
            let mut orders = Orders::new();
            for back in stages.iter().filter(|back| stage.gains_with(back)) {
                let [forward, backward] = [stage, back].map(DecoderStage::costs);
                let known = made.iter().find(|order| {
                    order.forward().iter().copied().eq(forward.iter().map(LayerCost::layer))
                        && order.backward().iter().copied().eq(backward.iter().map(LayerCost::layer))
                });
                let order = match known.cloned() {
                    Some(order) => order,
                    None => {
                        let order = Arc::new(weave(&forward, &backward)?);
                        made.push(order.clone());
                        order
                    }
                };
                orders.insert(back.stage, order);
            }
            of_stages.push(orders);
        }
        for (stage, orders) in stages.iter_mut().zip(of_stages) {
            stage.orders = orders;
        }
        Ok(())
    }

    /// The order in which a forward pass through this stage overlaps with a backward pass through `back`, if
    /// [`weave`](Self::weave) made one. There is none where nothing would be gained, as no rows travel in either pass, nor where
    /// both would count choices over all layers in the one place that the context has for it.
    pub fn order(&self, back: &DecoderStage) -> Option<&Order> {
        self.orders.get(&back.stage).map(|order| &**order)
    }

    fn gains_with(&self, back: &DecoderStage) -> bool {
        let travels = |stage: &DecoderStage| stage.moe_layers().any(|mlp| mlp.expert_ranks() > 1);
        self.choices == 0 && (travels(self) || travels(back))
    }

    fn costs(&self) -> Vec<LayerCost> {
        self.blocks.iter().map(|block| cost(&block.layer)).collect()
    }

    fn block(&self, layer: u32) -> Result<&Recompute<Block>> {
        self.blocks.get(layer as usize).ok_or_else(|| self.out_of_order())
    }

    fn experts(&self, layer: u32) -> Result<&MoeMlp> {
        match &self.block(layer)?.layer.mlp.layer {
            Mlp::Moe(mlp) => Ok(mlp),
            Mlp::Dense(_) => Err(self.out_of_order()),
        }
    }

    fn out_of_order(&self) -> Error {
        self.error("a step of a pass is not the next one")
    }
}

/// What is kept of a layer of experts whatever is made again.
fn routed<T: Float, D: Backend<T>>(saved: &SavedBlock<T, D>) -> Result<&Routed<T, D>> {
    match saved {
        RecomputeSaved::Input { kept, .. }
        | RecomputeSaved::Whole((_, RecomputeSaved::Input { kept, .. })) => kept.as_ref(),
        RecomputeSaved::Whole((_, RecomputeSaved::Whole(Either::Moe(saved)))) => Some(saved.routed()),
        RecomputeSaved::Whole((_, RecomputeSaved::Whole(Either::Dense(_)))) => None,
    }
    .ok_or(Error::OtherLayer)
}

/// A forward pass in steps.
pub struct ForwardTask<'a, T: Float, D: Backend<T>> {
    stage: &'a DecoderStage,
    m: u32,
    x: Option<Hidden<T, D>>,
    blocks: Vec<SavedBlock<T, D>>,
    within: Option<Within<T, D>>,
}

/// A forward pass within a layer of experts.
struct Within<T: Float, D: Backend<T>> {
    /// What is kept of the inputs of the block and of its second sublayer.
    inputs: [Option<Tensor<T, D>>; 2],
    attention: <SelfAttention as Layer<T, D>>::Saved,
    chosen: Chosen<T, D>,
    at: Forward<T, D>,
}

/// How far it is.
enum Forward<T: Float, D: Device> {
    Chosen,
    ToExperts(InFlight<T, D>),
    Arrived(Rows<T, D>),
    Computed(Tensor<T, D>, ExpertsSaved<T, D>),
    ToTokens(ExpertsSaved<T, D>, InFlight<T, D>),
}

impl<'a, T: Float, D: Backend<T>> ForwardTask<'a, T, D> {
    /// Begins with what [`Stage::forward`](moe_pipeline::Stage::forward) is given.
    pub fn new(
        stage: &'a DecoderStage,
        m: u32,
        x: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<Self> {
        let x = Some(Hidden::from(stage.input(m, x, cx)?));
        Ok(ForwardTask { stage, m, x, blocks: Vec::with_capacity(stage.blocks.len()), within: None })
    }

    fn take_x(&mut self) -> Result<Hidden<T, D>> {
        self.x.take().ok_or_else(|| self.stage.out_of_order())
    }

    /// Attention and router.
    fn enter(&mut self, layer: u32, cx: &mut Cx<T, D>) -> Result<Within<T, D>> {
        let (block, m) = (self.stage.block(layer)?, self.m);
        let (x, whole) = block.input(self.take_x()?, cx)?;
        cx.params.await_weights(block.layer.segment)?;
        let (x, attention) = block.layer.attention.forward(m, x, cx)?;
        let (x, input) = block.layer.mlp.input(x, cx)?;
        let chosen = self.stage.experts(layer)?.choose(m, x, cx)?;
        Ok(Within { inputs: [whole, input], attention, chosen, at: Forward::Chosen })
    }

    /// Combine has ended the layer.
    fn leave(&mut self, layer: u32, within: Within<T, D>, cx: &Cx<T, D>) -> Result<()> {
        let Within { inputs: [whole, input], attention, chosen, at } = within;
        let Forward::ToTokens(experts, flight) = at else { return Err(self.stage.out_of_order()) };
        let block = self.stage.block(layer)?;
        let (y, saved) = self.stage.experts(layer)?.combine_finish(chosen, experts, flight, cx)?;
        let mlp = block.layer.mlp.saved(input, Either::Moe(saved));
        self.blocks.push(block.saved(whole, (attention, mlp)));
        self.x = Some(y);
        Ok(())
    }
}

impl<T: Float, D: Backend<T>> Task for ForwardTask<'_, T, D> {
    type Cx = Cx<T, D>;
    type Out = (Option<Activation<T, D>>, StageSaved<T, D>);
    type Error = Error;

    fn step(&mut self, step: Step, cx: &mut Cx<T, D>) -> Result<()> {
        let (stage, node) = (self.stage, step.node());
        let layer = node.layer;
        match node.part {
            Part::Dense => {
                let (y, saved) = stage.block(layer)?.forward(self.m, self.take_x()?, cx)?;
                self.blocks.push(saved);
                self.x = Some(y);
                return Ok(());
            }
            Part::Attention => {
                self.within = Some(self.enter(layer, cx)?);
                return Ok(());
            }
            _ => {}
        }
        let mlp = stage.experts(layer)?;
        let Within { inputs, attention, mut chosen, at } =
            self.within.take().ok_or_else(|| stage.out_of_order())?;
        let at = match (step, node.part, at) {
            (Step::Start(_), Part::Dispatch, Forward::Chosen) => {
                Forward::ToExperts(mlp.dispatch_start(&chosen, cx)?)
            }
            (Step::Wait(_), Part::Dispatch, Forward::ToExperts(flight)) => {
                Forward::Arrived(mlp.dispatch_finish(&chosen, flight, cx)?)
            }
            (Step::Compute(_), Part::Experts, Forward::Arrived(rows)) => {
                let (out, experts) = mlp.compute(rows, cx)?;
                mlp.compute_shared(&mut chosen, cx)?;
                Forward::Computed(out, experts)
            }
            (Step::Start(_), Part::Combine, Forward::Computed(out, experts)) => {
                Forward::ToTokens(experts, mlp.combine_start(&chosen, out, cx)?)
            }
            (Step::Wait(_), Part::Combine, at) => {
                return self.leave(layer, Within { inputs, attention, chosen, at }, cx);
            }
            _ => return Err(stage.out_of_order()),
        };
        self.within = Some(Within { inputs, attention, chosen, at });
        Ok(())
    }

    fn finish(mut self, cx: &mut Cx<T, D>) -> Result<Self::Out> {
        let x = self.take_x()?.sum(&cx.device)?;
        Ok(self.stage.passed(Activation { x, choices: cx.choices.take() }, self.blocks))
    }
}

/// A backward pass in steps.
pub struct BackwardTask<'a, T: Float, D: Backend<T>> {
    stage: &'a DecoderStage,
    m: u32,
    dy: Option<Tensor<T, D>>,
    blocks: Vec<SavedBlock<T, D>>,
    within: Option<Backward<T, D>>,
    /// What weight gradients need, by layer.
    dense: BTreeMap<u32, <Block as Layer<T, D>>::Deferred>,
    moe: BTreeMap<u32, PendingWgrad<T, D>>,
}

/// The gradient of a layer's output, and what its forward pass kept.
type Entered<T, D> = (Tensor<T, D>, SavedBlock<T, D>);

/// What a layer's backward pass needs after its experts.
type Remaining<T, D> = (<SelfAttention as Layer<T, D>>::Saved, TokenSide<T, D>);

/// How far a backward pass is within a layer of experts.
enum Backward<T: Float, D: Backend<T>> {
    ToExperts(Entered<T, D>, InFlight<T, D>),
    Arrived(Entered<T, D>, Tensor<T, D>),
    Computed(Remaining<T, D>, ByRows<T, D>),
    ToTokens(Remaining<T, D>, InFlight<T, D>),
    Back(Remaining<T, D>, ByRows<T, D>),
}

/// What the weight gradients of attention need, and of the shared expert.
type AttentionDeferred<T, D> = (<SelfAttention as Layer<T, D>>::Deferred, SharedDeferred<T, D>);

/// What the weight gradients of a layer of experts still need.
struct PendingWgrad<T: Float, D: Backend<T>> {
    experts: Option<ExpertsDeferred<T, D>>,
    attention: Option<AttentionDeferred<T, D>>,
    /// How many of the two were added.
    added: usize,
}

impl<T: Float, D: Backend<T>> Default for PendingWgrad<T, D> {
    fn default() -> Self {
        PendingWgrad { experts: None, attention: None, added: 0 }
    }
}

impl<'a, T: Float, D: Backend<T>> BackwardTask<'a, T, D> {
    /// Begins with what [`Stage::backward`](moe_pipeline::Stage::backward) is given.
    pub fn new(
        stage: &'a DecoderStage,
        m: u32,
        dy: Option<Activation<T, D>>,
        saved: StageSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Self> {
        let dy = Some(stage.start_back(m, dy, saved.head, cx)?);
        let (dense, moe) = (BTreeMap::new(), BTreeMap::new());
        Ok(BackwardTask { stage, m, dy, blocks: saved.blocks, within: None, dense, moe })
    }

    fn take_dy(&mut self) -> Result<Tensor<T, D>> {
        self.dy.take().ok_or_else(|| self.stage.out_of_order())
    }

    fn take_saved(&mut self, layer: u32) -> Result<SavedBlock<T, D>> {
        match self.blocks.len() == layer as usize + 1 {
            true => self.blocks.pop().ok_or_else(|| self.stage.out_of_order()),
            false => Err(self.stage.out_of_order()),
        }
    }

    /// Through the experts. What forward did not keep is made again first: here, where it is needed, and not where the gradient sets out,
    /// which therefore travels beside the other pass.
    fn experts(
        &mut self,
        layer: u32,
        (dy, saved): Entered<T, D>,
        d_out: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Backward<T, D>> {
        let (block, mlp, m) = (self.stage.block(layer)?, self.stage.experts(layer)?, self.m);
        let (attention, saved) = block.whole(m, saved, cx)?;
        let Either::Moe(saved) = block.layer.mlp.whole(m, saved, cx)? else { return Err(Error::OtherLayer) };
        let (tokens, experts) = saved.sides(dy);
        let (by_rows, deferred) = mlp.compute_backward(experts, d_out, cx)?;
        self.moe.entry(layer).or_default().experts = Some(deferred);
        Ok(Backward::Computed((attention, tokens), by_rows))
    }

    /// Router and attention end the layer.
    fn leave(
        &mut self,
        layer: u32,
        (attention, tokens): Remaining<T, D>,
        by_tokens: ByRows<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let (dy, shared) = self.stage.experts(layer)?.choose_backward(self.m, tokens, by_tokens, cx)?;
        let (dx, attention) =
            self.stage.block(layer)?.layer.attention.backward_input(self.m, dy, attention, cx)?;
        self.moe.entry(layer).or_default().attention = Some((attention, shared));
        self.dy = Some(dx);
        Ok(())
    }

    fn weights(&mut self, layer: u32, part: Part, cx: &mut Cx<T, D>) -> Result<()> {
        let (stage, m) = (self.stage, self.m);
        let block = &stage.block(layer)?.layer;
        if part == Part::Dense {
            let deferred = self.dense.remove(&layer).ok_or_else(|| stage.out_of_order())?;
            return block.backward_weight(m, deferred, cx);
        }
        let pending = self.moe.entry(layer).or_default();
        match (part, pending.experts.take(), pending.attention.take()) {
            (Part::Experts, Some(deferred), attention) => {
                pending.attention = attention;
                stage.experts(layer)?.experts_weight(deferred, cx)?;
            }
            (Part::Attention, experts, Some((attention, shared))) => {
                pending.experts = experts;
                stage.experts(layer)?.shared_weight(shared, cx)?;
                block.attention.backward_weight(m, attention, cx)?;
            }
            _ => return Err(stage.out_of_order()),
        }
        pending.added += 1;
        match pending.added {
            2 => cx.grads_added(block.segment, m),
            _ => Ok(()),
        }
    }

    /// The input gradient of a dense layer.
    fn dense(&mut self, layer: u32, cx: &mut Cx<T, D>) -> Result<()> {
        let (dy, saved) = (self.take_dy()?, self.take_saved(layer)?);
        let (dx, deferred) = self.stage.block(layer)?.backward_input(self.m, dy, saved, cx)?;
        self.dense.insert(layer, deferred);
        self.dy = Some(dx);
        Ok(())
    }
}

impl<T: Float, D: Backend<T>> Task for BackwardTask<'_, T, D> {
    type Cx = Cx<T, D>;
    type Out = Option<Activation<T, D>>;
    type Error = Error;

    fn step(&mut self, step: Step, cx: &mut Cx<T, D>) -> Result<()> {
        let (stage, node) = (self.stage, step.node());
        let layer = node.layer;
        if node.phase == Phase::WeightGradient {
            return self.weights(layer, node.part, cx);
        }
        if node.part == Part::Dense {
            return self.dense(layer, cx);
        }
        let mlp = stage.experts(layer)?;
        let at = match (step, node.part, self.within.take()) {
            (Step::Start(_), Part::Combine, None) => {
                let entered = (self.take_dy()?, self.take_saved(layer)?);
                let flight = mlp.combine_backward_start(&entered.0, routed(&entered.1)?, cx)?;
                Backward::ToExperts(entered, flight)
            }
            (Step::Wait(_), Part::Combine, Some(Backward::ToExperts(entered, flight))) => {
                let d_out = mlp.combine_backward_finish(routed(&entered.1)?, flight, cx)?;
                Backward::Arrived(entered, d_out)
            }
            (Step::Compute(_), Part::Experts, Some(Backward::Arrived(entered, d_out))) => {
                self.experts(layer, entered, d_out, cx)?
            }
            (Step::Start(_), Part::Dispatch, Some(Backward::Computed(remaining, by_rows))) => {
                let flight = mlp.dispatch_backward_start(&remaining.1, by_rows, cx)?;
                Backward::ToTokens(remaining, flight)
            }
            (Step::Wait(_), Part::Dispatch, Some(Backward::ToTokens(remaining, flight))) => {
                let by_tokens = mlp.dispatch_backward_finish(&remaining.1, flight, cx)?;
                Backward::Back(remaining, by_tokens)
            }
            (Step::Compute(_), Part::Attention, Some(Backward::Back(remaining, by_tokens))) => {
                return self.leave(layer, remaining, by_tokens, cx);
            }
            _ => return Err(stage.out_of_order()),
        };
        self.within = Some(at);
        Ok(())
    }

    fn finish(mut self, cx: &mut Cx<T, D>) -> Result<Self::Out> {
        let dx = self.take_dy()?;
        let (dx, rows) = self.stage.end_back(dx, cx)?;
        if let (Some(embedding), Some(rows)) = (&self.stage.embedding, rows) {
            embedding.backward_weight(self.m, &rows, cx)?;
        }
        Ok(dx)
    }
}
