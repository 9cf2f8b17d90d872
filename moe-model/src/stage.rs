//! The layers of one pipeline stage.

mod weave;

use moe_comm::Reduction;
use moe_dispatch::ModelUnit;
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_pipeline::Stage;
use moe_topology::Attention;

use self::weave::{BackwardTask, ForwardTask, Orders};
use crate::axes::TP_CP;
use crate::block::{Block, Mlp};
use crate::cache::KvCache;
use crate::config::ModelConfig;
use crate::cx::MoeStats;
use crate::embedding::TokenEmbedding;
use crate::expert_bias::ExpertBias;
use crate::head::Head;
use crate::layer::{Hidden, Layer};
use crate::moe::MoeMlp;
use crate::params::ParamLayoutBuilder;
use crate::pipeline::PipelineLayout;
use crate::recompute::{Recompute, RecomputeModule};
use crate::transport::Activation;
use crate::{Cx, Error, Execution, Result};

/// The layers of one stage of a [`PipelineLayout`], with the embedding on the first stage and the head on the last. It reads
/// its micro-batch from the context, so the first stage takes no input and the last gives no output.
#[derive(Debug)]
pub struct DecoderStage {
    stage: usize,
    /// Experts whose choices are counted over all layers, 0 without a loss that needs it.
    choices: usize,
    embedding: Option<TokenEmbedding>,
    blocks: Vec<Recompute<Block>>,
    head: Option<Head>,
    /// Of overlaps of its forward passes, where they were [made](DecoderStage::weave).
    orders: Orders,
}

type SavedBlock<T, D> = <Recompute<Block> as Layer<T, D>>::Saved;

/// A micro-batch's choices of each expert over all layers, `[1, experts]`, where they are counted.
type Counts<D> = Option<Tensor<i64, D>>;

/// What backward needs of a forward pass.
pub struct StageSaved<T: Float, D: Backend<T>> {
    blocks: Vec<SavedBlock<T, D>>,
    /// What the head gets, whose forward pass is in its backward, and the micro-batch's choices over all layers.
    head: Option<Activation<T, D>>,
}

/// What the weight gradients need.
pub struct StageDeferred<T: Float, D: Backend<T>> {
    embedding: Option<Tensor<T, D>>,
    blocks: Vec<<Recompute<Block> as Layer<T, D>>::Deferred>,
}

/// The gradient of a stage's input, if another stage gets it, and what the weight gradients still need.
type InputGradient<T, D> = (Option<Activation<T, D>>, StageDeferred<T, D>);

/// The gradient of a stage's input, if another stage gets it, or the rows of the embedding's gradient.
type GradientOrRows<T, D> = (Option<Activation<T, D>>, Option<Tensor<T, D>>);

/// Whether weight gradients follow the input gradient layer by layer, or are for a later call.
#[derive(Debug, Clone, Copy)]
enum When {
    Now,
    Later,
}

impl DecoderStage {
    /// The stages of the rank that `params` is for, ascending; adds their parameters to it.
    ///
    /// # Errors
    /// `layout` is for another number of layers or pipeline ranks, or a size of the model does not divide.
    pub fn of_rank(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        execution: Execution,
        layout: &PipelineLayout,
    ) -> Result<Vec<Self>> {
        let (got, layers) = (layout.num_layers(), config.num_hidden_layers);
        if got != layers {
            return Err(Error::LayerCount { got, layers });
        }
        let (ranks, pp) = (layout.ranks(), params.folding().size(Attention::PP));
        if ranks != pp {
            return Err(Error::LayoutRanks { ranks, pp });
        }
        let owner = params.folding().stage(params.rank());
        let full = execution.recompute.contains(RecomputeModule::Full);
        let execution = Execution { recompute: execution.recompute.inside(full), ..execution };
        layout
            .stages_of(owner)
            .map(|stage| {
                let (first, last) = (stage == 0, stage + 1 == layout.stages());
                let embedding = first.then(|| TokenEmbedding::new(params, config, layout)).transpose()?;
                let blocks = layout
                    .layers(stage)
                    .map(|layer| {
                        let layer = Block::new(params, config, execution, layer, owner)?;
                        Ok(Recompute { layer, enabled: full })
                    })
                    .collect::<Result<Vec<_>>>()?;
                let head = last.then(|| Head::new(params, config, layout)).transpose()?;
                let (choices, orders) = (config.choices_of_all_layers(), Orders::new());
                Ok(DecoderStage { stage, choices, embedding, blocks, head, orders })
            })
            .collect()
    }

    /// Fresh statistics for a step of a rank's stages.
    pub fn moe_stats<'a, D: Device>(
        stages: impl IntoIterator<Item = &'a DecoderStage>,
        device: &D,
    ) -> Result<MoeStats<D>> {
        let layers = Vec::from_iter(stages.into_iter().flat_map(DecoderStage::moe_layers));
        let num_experts = layers.first().map_or(0, |mlp| mlp.num_experts());
        MoeStats::new(device, layers.into_iter().map(MoeMlp::layer).collect(), num_experts)
    }

    /// The biases of its routers, each with the global index of the layer.
    pub fn expert_biases(&self) -> impl Iterator<Item = (usize, ExpertBias)> {
        self.moe_layers().filter_map(|mlp| Some((mlp.layer(), mlp.expert_bias()?)))
    }

    fn moe_layers(&self) -> impl Iterator<Item = &MoeMlp> {
        self.blocks.iter().filter_map(|block| match &block.layer.mlp.layer {
            Mlp::Moe(mlp) => Some(mlp),
            Mlp::Dense(_) => None,
        })
    }

    /// What the first block gets: from the embedding, or `x`. The context goes on to count choices where `x` left off.
    fn input<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        match (&self.embedding, x) {
            (Some(embedding), None) => {
                let choices = (self.choices > 0).then(|| Tensor::zeros(&cx.device, 1, self.choices));
                cx.choices = choices.transpose()?;
                embedding.forward(m, cx)
            }
            (None, Some(Activation { x, choices })) => {
                cx.choices = choices;
                Ok(x)
            }
            (Some(_), Some(_)) => Err(self.error("the first stage takes no activation")),
            (None, None) => Err(self.error("a later stage needs the activation of the one before")),
        }
    }

    /// Through the embedding (or from `x`) and the blocks, each of which hands to `keep` what its backward needs.
    fn body<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
        mut keep: impl FnMut(SavedBlock<T, D>),
    ) -> Result<Activation<T, D>> {
        let mut x = Hidden::from(self.input(m, x, cx)?);
        for block in &self.blocks {
            let (y, saved) = block.forward(m, x, cx)?;
            keep(saved);
            x = y;
        }
        let x = x.sum(&cx.device)?;
        Ok(Activation { x, choices: cx.choices.take() })
    }

    /// The gradient of the input, layer by layer, and what the weight gradients still need: nothing if they are added now.
    fn back<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        dy: Option<Activation<T, D>>,
        saved: StageSaved<T, D>,
        cx: &mut Cx<T, D>,
        weights: When,
    ) -> Result<InputGradient<T, D>> {
        let mut rest = StageDeferred { embedding: None, blocks: Vec::new() };
        let mut dx = self.start_back(m, dy, saved.head, cx)?;
        for (block, saved) in self.blocks.iter().zip(saved.blocks).rev() {
            let (next, deferred) = block.backward_input(m, dx, saved, cx)?;
            match weights {
                When::Now => block.backward_weight(m, deferred, cx)?,
                When::Later => rest.blocks.push(deferred),
            }
            dx = next;
        }
        let (dx, rows) = self.end_back(dx, cx)?;
        match (weights, &self.embedding, rows) {
            (When::Now, Some(embedding), Some(rows)) => embedding.backward_weight(m, &rows, cx)?,
            (_, _, rows) => rest.embedding = rows,
        }
        Ok((dx, rest))
    }

    /// The gradient of what the last block gave: the head's, or `dy`.
    fn start_back<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        dy: Option<Activation<T, D>>,
        head: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        match (&self.head, head, dy) {
            (Some(head), Some(Activation { x, choices }), None) => {
                cx.choices = unit_choices(choices, cx)?;
                head.backward(m, x, cx)
            }
            (None, None, Some(Activation { x, choices })) => {
                cx.choices = choices;
                Ok(x)
            }
            _ => Err(self.error("the last stage takes no gradient, every other one needs it")),
        }
    }

    /// What the gradient of the first block's input is for: another stage, or the embedding's rows.
    fn end_back<T: Float, D: Backend<T>>(
        &self,
        dx: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<GradientOrRows<T, D>> {
        let choices = cx.choices.take();
        match &self.embedding {
            None => Ok((Some(Activation { x: dx, choices }), None)),
            Some(embedding) => Ok((None, Some(embedding.backward_input(&dx, cx)?))),
        }
    }

    /// What a forward pass gives and keeps.
    fn passed<T: Float, D: Backend<T>>(
        &self,
        y: Activation<T, D>,
        blocks: Vec<SavedBlock<T, D>>,
    ) -> (Option<Activation<T, D>>, StageSaved<T, D>) {
        let (y, head) = if self.head.is_some() { (None, Some(y)) } else { (Some(y), None) };
        (y, StageSaved { blocks, head })
    }

    /// Forward without a loss: the activation for the next stage, or on the last stage this rank's vocabulary block of
    /// the logits, `[positions · sequences, vocab block]`.
    pub fn infer<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Option<Activation<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<Activation<T, D>> {
        let mut y = self.body(m, x, cx, drop)?;
        if let Some(head) = &self.head {
            y.x = head.logits(y.x, cx)?;
        }
        Ok(y)
    }

    /// A cache for the keys and values of its layers, of `capacity` positions of `batch` sequences.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn cache<T: Float, D: Device>(
        &self,
        device: &D,
        batch: usize,
        capacity: usize,
    ) -> Result<KvCache<T, D>> {
        KvCache::new(
            device,
            batch,
            capacity,
            self.blocks.iter().map(|block| block.layer.attention.kv_width()),
        )
    }

    /// As [`infer`](Self::infer), of a micro-batch whose tokens follow those in `cache`: their positions go on from
    /// `cache.len()`. They are added to the cache. The logits are those of the last `logits` positions alone.
    ///
    /// # Errors
    /// [`Error::CacheFull`]; [`Error::CacheRanks`] where sequences are cut over ranks; the micro-batch has documents or
    /// padding, or another number of sequences than the cache. The cache then counts what it had.
    pub fn extend<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Option<Activation<T, D>>,
        cache: &mut KvCache<T, D>,
        logits: usize,
        cx: &mut Cx<T, D>,
    ) -> Result<Activation<T, D>> {
        let ranks = cx.group(TP_CP)?.size();
        if ranks > 1 {
            return Err(Error::CacheRanks { ranks });
        }
        let micro_batch = cx.batch(m)?;
        let (batch, added) = (micro_batch.batch, micro_batch.seq_len);
        if micro_batch.documents.is_some() || micro_batch.valid.is_some() {
            return Err(self.error("a cache takes whole sequences, without separated documents or padding"));
        }
        if batch != cache.batch() {
            return Err(self.error("a micro-batch has another number of sequences than the cache"));
        }
        cache.check_room(added)?;
        let mut x = Hidden::from(self.input(m, x, cx)?);
        for (block, layer) in self.blocks.iter().zip(cache.layers()) {
            x = block.layer.extend(m, x, layer, cx)?;
        }
        let mut x = x.sum(&cx.device)?;
        cache.added(added);
        if let Some(head) = &self.head {
            let last = x.shape()[0].saturating_sub(logits * batch)..x.shape()[0];
            x = head.logits(x.rows(last)?, cx)?;
        }
        Ok(Activation { x, choices: cx.choices.take() })
    }

    fn error(&self, what: &'static str) -> Error {
        Error::Stage { stage: self.stage, what }
    }
}

/// A micro-batch's choices over all layers, or those of the whole step where the load-balancing loss takes it together.
fn unit_choices<T: Float, D: Device>(choices: Counts<D>, cx: &Cx<T, D>) -> Result<Counts<D>> {
    let Some(choices) = choices else { return Ok(None) };
    match (cx.model_unit, cx.batches.len()) {
        (ModelUnit::MicroBatch, _) => Ok(Some(choices)),
        (ModelUnit::Step, 1) => Ok(Some(cx.group(Attention::DP)?.all_reduce(&choices, Reduction::Sum)?)),
        (ModelUnit::Step, batches) => Err(Error::StepOfSeveral { batches }),
    }
}

/// A [`DecoderStage`] that keeps nothing and has no head: for passes that are made for what routers count, in
/// [`Cx::stats`].
#[derive(Debug)]
pub struct CountingStage<'a, T, D> {
    stage: &'a DecoderStage,
    types: std::marker::PhantomData<fn() -> (T, D)>,
}

impl<'a, T: Float, D: Device> CountingStage<'a, T, D> {
    /// Counts in the layers of `stage`.
    pub fn new(stage: &'a DecoderStage) -> Self {
        CountingStage { stage, types: std::marker::PhantomData }
    }
}

impl<T: Float, D: Backend<T>> Stage for CountingStage<'_, T, D> {
    type Cx = Cx<T, D>;
    type Act = Activation<T, D>;
    type Saved = ();
    type Deferred = ();
    type Error = Error;

    fn forward(
        &self,
        m: u32,
        x: Option<Self::Act>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Option<Self::Act>, Self::Saved)> {
        let y = self.stage.body(m, x, cx, drop)?;
        Ok((self.stage.head.is_none().then_some(y), ()))
    }

    fn backward_input(
        &self,
        _m: u32,
        _dy: Option<Self::Act>,
        _saved: Self::Saved,
        _cx: &mut Cx<T, D>,
    ) -> Result<(Option<Self::Act>, Self::Deferred)> {
        Err(self.stage.error("a pass that counts has no backward"))
    }

    fn backward_weight(&self, _m: u32, _deferred: Self::Deferred, _cx: &mut Cx<T, D>) -> Result<()> {
        Err(self.stage.error("a pass that counts has no backward"))
    }
}

/// [`DecoderStage`] for one element type and device: what a pipeline executor runs.
#[derive(Debug)]
pub struct TypedStage<T, D> {
    stage: DecoderStage,
    types: std::marker::PhantomData<fn() -> (T, D)>,
}

impl<T: Float, D: Device> TypedStage<T, D> {
    /// Fixes the types.
    pub fn new(stage: DecoderStage) -> Self {
        TypedStage { stage, types: std::marker::PhantomData }
    }
}

impl<T, D> std::ops::Deref for TypedStage<T, D> {
    type Target = DecoderStage;

    fn deref(&self) -> &DecoderStage {
        &self.stage
    }
}

impl<T: Float, D: Backend<T>> Stage for TypedStage<T, D> {
    type Cx = Cx<T, D>;
    type Act = Activation<T, D>;
    type Saved = StageSaved<T, D>;
    type Deferred = StageDeferred<T, D>;
    type Error = Error;

    fn forward(
        &self,
        m: u32,
        x: Option<Self::Act>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Option<Self::Act>, Self::Saved)> {
        let mut blocks = Vec::with_capacity(self.stage.blocks.len());
        let y = self.stage.body(m, x, cx, |saved| blocks.push(saved))?;
        Ok(self.stage.passed(y, blocks))
    }

    fn forward_only(&self, m: u32, x: Option<Self::Act>, cx: &mut Cx<T, D>) -> Result<Option<Self::Act>> {
        let y = self.stage.body(m, x, cx, drop)?;
        match &self.stage.head {
            Some(head) => head.loss(m, y.x, cx).map(|()| None),
            None => Ok(Some(y)),
        }
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Option<Self::Act>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Option<Self::Act>, Self::Deferred)> {
        self.stage.back(m, dy, saved, cx, When::Later)
    }

    fn backward_weight(&self, m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        let stage = &self.stage;
        for (block, deferred) in stage.blocks.iter().rev().zip(deferred.blocks) {
            block.backward_weight(m, deferred, cx)?;
        }
        if let (Some(embedding), Some(rows)) = (&stage.embedding, deferred.embedding) {
            embedding.backward_weight(m, &rows, cx)?;
        }
        Ok(())
    }

    fn backward(
        &self,
        m: u32,
        dy: Option<Self::Act>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<Option<Self::Act>> {
        Ok(self.stage.back(m, dy, saved, cx, When::Now)?.0)
    }

    /// Woven, so that each pass computes while rows of the other travel between the ranks of experts, if
    /// [`DecoderStage::weave`] made an order. No bit depends on it.
    fn overlap(
        &self,
        forward: (u32, Option<Self::Act>),
        back: &Self,
        backward: (u32, Option<Self::Act>, Self::Saved),
        cx: &mut Cx<T, D>,
    ) -> Result<((Option<Self::Act>, Self::Saved), Option<Self::Act>)> {
        let ((m, x), (back_m, dy, saved)) = (forward, backward);
        match self.stage.order(&back.stage) {
            Some(order) => {
                let forward = ForwardTask::new(&self.stage, m, x, cx)?;
                let backward = BackwardTask::new(&back.stage, back_m, dy, saved, cx)?;
                moe_pipeline::weave::run(order, forward, backward, cx)
            }
            None => {
                let made = self.forward(m, x, cx)?;
                Ok((made, back.backward(back_m, dy, saved, cx)?))
            }
        }
    }
}
