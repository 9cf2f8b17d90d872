//! A decoder block: attention, then a dense feed-forward layer or experts.

use moe_kernels::{Backend, Float, Tensor};

use crate::attention::SelfAttention;
use crate::cache::LayerCache;
use crate::config::ModelConfig;
use crate::dense::DenseMlp;
use crate::layer::{Hidden, Layer, Passed};
use crate::moe::MoeMlp;
use crate::params::{ParamLayoutBuilder, Segment};
use crate::recompute::{Recompute, RecomputeModule, RecomputeSaved, Rerun};
use crate::{Cx, Error, Execution, Result};

/// `x → x + attention(norm(x)) → x + mlp(norm(x))`.
#[derive(Debug, Clone)]
pub struct Block {
    /// The parameters of both.
    pub segment: Segment,
    /// The attention sublayer.
    pub attention: SelfAttention,
    /// The feed-forward sublayer.
    pub mlp: Recompute<Mlp>,
}

/// The feed-forward sublayer of a block: [`ModelConfig::is_moe_layer`] says which.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one per layer
pub enum Mlp {
    /// One for all tokens.
    Dense(DenseMlp),
    /// Experts.
    Moe(MoeMlp),
}

impl Block {
    /// Block `layer` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        execution: Execution,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let segment = params.begin_segment();
        let attention = SelfAttention::new(params, config, execution.recompute, layer, stage)?;
        let moe = config.is_moe_layer(layer);
        let enabled =
            execution.recompute.contains(if moe { RecomputeModule::Moe } else { RecomputeModule::Mlp });
        let execution = Execution { recompute: execution.recompute.inside(enabled), ..execution };
        let mlp = match moe {
            true => Mlp::Moe(MoeMlp::new(params, config, execution, layer, stage)?),
            false => Mlp::Dense(DenseMlp::new(params, config, execution.recompute, layer, stage)?),
        };
        Ok(Block { segment, attention, mlp: Recompute { layer: mlp, enabled } })
    }

    /// The forward pass of tokens that follow those in `cache`, to which their keys and values are added.
    pub fn extend<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Hidden<T, D>,
        cache: LayerCache<'_, T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Hidden<T, D>> {
        cx.params.await_weights(self.segment)?;
        let x = self.attention.extend(m, x, cache, cx)?;
        Ok(self.mlp.layer.forward(m, x, cx)?.0)
    }
}

type Saved<L, T, D> = <L as Layer<T, D>>::Saved;
type Deferred<L, T, D> = <L as Layer<T, D>>::Deferred;
type Kept<L, T, D> = <L as Rerun<T, D>>::Kept;

/// A value that belongs to either kind of sublayer.
#[derive(Debug)]
pub enum Either<A, B> {
    /// Of a dense one.
    Dense(A),
    /// Of experts.
    Moe(B),
}

impl<T: Float, D: Backend<T>> Layer<T, D> for Mlp {
    type Saved = Either<Saved<DenseMlp, T, D>, Saved<MoeMlp, T, D>>;
    type Deferred = Either<Deferred<DenseMlp, T, D>, Deferred<MoeMlp, T, D>>;

    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        Ok(match self {
            Mlp::Dense(mlp) => {
                let (y, saved) = mlp.forward(m, x, cx)?;
                (y, Either::Dense(saved))
            }
            Mlp::Moe(mlp) => {
                let (y, saved) = mlp.forward(m, x, cx)?;
                (y, Either::Moe(saved))
            }
        })
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        match (self, saved) {
            (Mlp::Dense(mlp), Either::Dense(saved)) => {
                let (dx, deferred) = mlp.backward_input(m, dy, saved, cx)?;
                Ok((dx, Either::Dense(deferred)))
            }
            (Mlp::Moe(mlp), Either::Moe(saved)) => {
                let (dx, deferred) = mlp.backward_input(m, dy, saved, cx)?;
                Ok((dx, Either::Moe(deferred)))
            }
            _ => Err(Error::OtherLayer),
        }
    }

    fn backward_weight(&self, m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        match (self, deferred) {
            (Mlp::Dense(mlp), Either::Dense(deferred)) => mlp.backward_weight(m, deferred, cx),
            (Mlp::Moe(mlp), Either::Moe(deferred)) => mlp.backward_weight(m, deferred, cx),
            _ => Err(Error::OtherLayer),
        }
    }
}

impl<T: Float, D: Backend<T>> Rerun<T, D> for Mlp {
    type Kept = Option<Kept<MoeMlp, T, D>>;

    fn keep(saved: Self::Saved) -> Self::Kept {
        match saved {
            Either::Dense(_) => None,
            Either::Moe(saved) => Some(MoeMlp::keep(saved)),
        }
    }

    fn rerun(&self, m: u32, x: Hidden<T, D>, kept: Self::Kept, cx: &mut Cx<T, D>) -> Result<Self::Saved> {
        match (self, kept) {
            (Mlp::Dense(mlp), None) => Ok(Either::Dense(mlp.rerun(m, x, (), cx)?)),
            (Mlp::Moe(mlp), Some(kept)) => Ok(Either::Moe(mlp.rerun(m, x, kept, cx)?)),
            _ => Err(Error::OtherLayer),
        }
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for Block {
    type Saved = (Saved<SelfAttention, T, D>, Saved<Recompute<Mlp>, T, D>);
    type Deferred = (Deferred<SelfAttention, T, D>, Deferred<Mlp, T, D>);

    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        cx.params.await_weights(self.segment)?;
        let (x, attention) = self.attention.forward(m, x, cx)?;
        let (x, mlp) = self.mlp.forward(m, x, cx)?;
        Ok((x, (attention, mlp)))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        (attention, mlp): Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let (dy, mlp) = self.mlp.backward_input(m, dy, mlp, cx)?;
        let (dx, attention) = self.attention.backward_input(m, dy, attention, cx)?;
        Ok((dx, (attention, mlp)))
    }

    fn backward_weight(&self, m: u32, (attention, mlp): Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        self.mlp.backward_weight(m, mlp, cx)?;
        self.attention.backward_weight(m, attention, cx)?;
        cx.grads_added(self.segment, m)
    }
}

impl<T: Float, D: Backend<T>> Rerun<T, D> for Block {
    type Kept = Kept<Mlp, T, D>;

    fn keep((_, mlp): Self::Saved) -> Self::Kept {
        match mlp {
            RecomputeSaved::Whole(saved) => Mlp::keep(saved),
            RecomputeSaved::Input { kept, .. } => kept,
        }
    }

    fn rerun(&self, m: u32, x: Hidden<T, D>, kept: Self::Kept, cx: &mut Cx<T, D>) -> Result<Self::Saved> {
        let (x, attention) = self.attention.forward(m, x, cx)?;
        Ok((attention, RecomputeSaved::Whole(self.mlp.layer.rerun(m, x, kept, cx)?)))
    }
}
