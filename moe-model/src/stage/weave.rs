//! A forward and a backward pass through stages, woven so that rows travel while the other pass computes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use moe_kernels::{Backend, Device, Float, Tensor};
use moe_pipeline::StageCost;
use moe_pipeline::weave::{LayerCost, Order, Part, Phase, Step, Task, weave};

use super::{DecoderStage, SavedBlock, StageSaved};
use crate::attention::SelfAttention;
use crate::block::{Block, Either, Mlp};
use crate::layer::{Hidden, Layer};
use crate::moe::steps::{ByRows, Chosen, Computed, ExpertsDeferred, GoingBack, SharedDeferred, Way};
use crate::moe::{MoeMlp, Rows};
use crate::recompute::Recompute;
use crate::transport::Activation;
use crate::{Cx, Error, Result};

/// The orders in which a stage's forward passes are woven with backward passes, by the stage of these.
#[derive(Debug, Default)]
pub struct Orders(Mutex<BTreeMap<usize, Arc<Order>>>);

/// Every computation and every all-to-all taken as equally long: whatever they take, an all-to-all has one of the other pass beside it.
fn cost(moe: bool) -> LayerCost {
    let one = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
    match moe {
        true => LayerCost::Moe { attention: one, experts: one, all_to_all: 1.0 },
        false => LayerCost::Dense(one),
    }
}

impl DecoderStage {
    /// The order of an overlap with a backward pass through `back`; none where nothing would be gained (no rows travel in one of the
    /// passes), or where both passes would count choices over layers in the one place that the context has for it.
    pub(super) fn order(&self, back: &DecoderStage) -> Result<Option<Arc<Order>>> {
        let travels = |stage: &DecoderStage| stage.moe_layers().any(|mlp| mlp.expert_ranks() > 1);
        if self.choices > 0 || !travels(self) || !travels(back) {
            return Ok(None);
        }
        let mut orders = self.orders.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(order) = orders.get(&back.stage) {
            return Ok(Some(order.clone()));
        }
        let costs = |stage: &DecoderStage| {
            let moe = |block: &Recompute<Block>| cost(matches!(block.layer.mlp.layer, Mlp::Moe(_)));
            stage.blocks.iter().map(moe).collect::<Vec<_>>()
        };
        let order = Arc::new(weave(&costs(self), &costs(back))?);
        orders.insert(back.stage, order.clone());
        Ok(Some(order))
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

/// A forward pass in steps.
pub struct Ahead<'a, T: Float, D: Backend<T>> {
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
    ToExperts(Way<T, D>),
    Arrived(Rows<T, D>),
    Computed(Tensor<T, D>, Computed<T, D>),
    ToTokens(Computed<T, D>, Way<T, D>),
}

impl<'a, T: Float, D: Backend<T>> Ahead<'a, T, D> {
    /// Begins with what [`Stage::forward`](moe_pipeline::Stage::forward) is given.
    pub fn new(
        stage: &'a DecoderStage,
        m: u32,
        x: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<Self> {
        let x = Some(Hidden::from(stage.input(m, x, cx)?));
        Ok(Ahead { stage, m, x, blocks: Vec::with_capacity(stage.blocks.len()), within: None })
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
        let Forward::ToTokens(computed, way) = at else { return Err(self.stage.out_of_order()) };
        let block = self.stage.block(layer)?;
        let (y, saved) = self.stage.experts(layer)?.combine_finish(chosen, computed, way, cx)?;
        let mlp = block.layer.mlp.saved(input, Either::Moe(saved));
        self.blocks.push(block.saved(whole, (attention, mlp)));
        self.x = Some(y);
        Ok(())
    }
}

impl<T: Float, D: Backend<T>> Task for Ahead<'_, T, D> {
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
                Forward::ToExperts(mlp.dispatch_start(&mut chosen, cx)?)
            }
            (Step::Wait(_), Part::Dispatch, Forward::ToExperts(way)) => {
                Forward::Arrived(mlp.dispatch_finish(&chosen, way, cx)?)
            }
            (Step::Compute(_), Part::Experts, Forward::Arrived(rows)) => {
                let (out, computed) = mlp.compute(rows, cx)?;
                Forward::Computed(out, computed)
            }
            (Step::Start(_), Part::Combine, Forward::Computed(out, computed)) => {
                Forward::ToTokens(computed, mlp.combine_start(&chosen, out, cx)?)
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
pub struct Behind<'a, T: Float, D: Backend<T>> {
    stage: &'a DecoderStage,
    m: u32,
    dy: Option<Tensor<T, D>>,
    blocks: Vec<SavedBlock<T, D>>,
    within: Option<Returning<T, D>>,
    /// What weight gradients need, by layer.
    dense: BTreeMap<u32, <Block as Layer<T, D>>::Deferred>,
    moe: BTreeMap<u32, Late<T, D>>,
}

/// A backward pass within a layer of experts.
struct Returning<T: Float, D: Backend<T>> {
    attention: <SelfAttention as Layer<T, D>>::Saved,
    going: GoingBack<T, D>,
    at: Backward<T, D>,
}

/// How far it is.
enum Backward<T: Float, D: Device> {
    ToExperts(Computed<T, D>, Way<T, D>),
    Arrived(Computed<T, D>, Tensor<T, D>),
    Computed(ByRows<T, D>),
    ToTokens(Way<T, D>),
    Back(ByRows<T, D>),
}

/// What the weight gradients of attention need, and of the shared expert.
type AttentionDeferred<T, D> = (<SelfAttention as Layer<T, D>>::Deferred, SharedDeferred<T, D>);

/// What the weight gradients of a layer of experts still need.
struct Late<T: Float, D: Backend<T>> {
    experts: Option<ExpertsDeferred<T, D>>,
    attention: Option<AttentionDeferred<T, D>>,
    /// Which of the two were added.
    added: usize,
}

impl<T: Float, D: Backend<T>> Default for Late<T, D> {
    fn default() -> Self {
        Late { experts: None, attention: None, added: 0 }
    }
}

impl<'a, T: Float, D: Backend<T>> Behind<'a, T, D> {
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
        Ok(Behind { stage, m, dy, blocks: saved.blocks, within: None, dense, moe })
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

    /// What forward did not keep is made again, and the gradient goes to the experts.
    fn enter(&mut self, layer: u32, cx: &mut Cx<T, D>) -> Result<Returning<T, D>> {
        let (block, mlp, m) = (self.stage.block(layer)?, self.stage.experts(layer)?, self.m);
        let (dy, saved) = (self.take_dy()?, self.take_saved(layer)?);
        let (attention, saved) = block.whole(m, saved, cx)?;
        let Either::Moe(saved) = block.layer.mlp.whole(m, saved, cx)? else { return Err(Error::OtherLayer) };
        let (going, computed, way) = mlp.combine_backward_start(dy, saved, cx)?;
        Ok(Returning { attention, going, at: Backward::ToExperts(computed, way) })
    }

    /// Router and attention end the layer.
    fn leave(&mut self, layer: u32, returning: Returning<T, D>, cx: &mut Cx<T, D>) -> Result<()> {
        let Returning { attention, going, at } = returning;
        let Backward::Back(by_tokens) = at else { return Err(self.stage.out_of_order()) };
        let (dy, shared) = self.stage.experts(layer)?.choose_backward(self.m, going, by_tokens, cx)?;
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
        let late = self.moe.entry(layer).or_default();
        match (part, late.experts.take(), late.attention.take()) {
            (Part::Experts, Some(deferred), attention) => {
                late.attention = attention;
                stage.experts(layer)?.experts_weight(deferred, cx)?;
            }
            (Part::Attention, experts, Some((attention, shared))) => {
                late.experts = experts;
                stage.experts(layer)?.shared_weight(shared, cx)?;
                block.attention.backward_weight(m, attention, cx)?;
            }
            _ => return Err(stage.out_of_order()),
        }
        late.added += 1;
        match late.added {
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

impl<T: Float, D: Backend<T>> Task for Behind<'_, T, D> {
    type Cx = Cx<T, D>;
    type Out = Option<Activation<T, D>>;
    type Error = Error;

    fn step(&mut self, step: Step, cx: &mut Cx<T, D>) -> Result<()> {
        let (stage, node) = (self.stage, step.node());
        let layer = node.layer;
        if node.phase == Phase::WeightGradient {
            return self.weights(layer, node.part, cx);
        }
        match (step, node.part) {
            (_, Part::Dense) => return self.dense(layer, cx),
            (Step::Start(_), Part::Combine) => {
                self.within = Some(self.enter(layer, cx)?);
                return Ok(());
            }
            _ => {}
        }
        let mlp = stage.experts(layer)?;
        let Returning { attention, going, at } = self.within.take().ok_or_else(|| stage.out_of_order())?;
        let at = match (step, node.part, at) {
            (Step::Wait(_), Part::Combine, Backward::ToExperts(computed, way)) => {
                Backward::Arrived(computed, mlp.combine_backward_finish(&going, way, cx)?)
            }
            (Step::Compute(_), Part::Experts, Backward::Arrived(computed, d_out)) => {
                let (by_rows, deferred) = mlp.compute_backward(computed, d_out, cx)?;
                self.moe.entry(layer).or_default().experts = Some(deferred);
                Backward::Computed(by_rows)
            }
            (Step::Start(_), Part::Dispatch, Backward::Computed(by_rows)) => {
                Backward::ToTokens(mlp.dispatch_backward_start(&going, by_rows, cx)?)
            }
            (Step::Wait(_), Part::Dispatch, Backward::ToTokens(way)) => {
                Backward::Back(mlp.dispatch_backward_finish(&going, way, cx)?)
            }
            (Step::Compute(_), Part::Attention, at) => {
                return self.leave(layer, Returning { attention, going, at }, cx);
            }
            _ => return Err(stage.out_of_order()),
        };
        self.within = Some(Returning { attention, going, at });
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
