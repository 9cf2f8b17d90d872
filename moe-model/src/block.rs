//! A decoder block: attention, then experts.

use moe_dispatch::DispatcherKind;
use moe_kernels::{Backend, Float, Tensor};

use crate::attention::SelfAttention;
use crate::config::ModelConfig;
use crate::layer::Layer;
use crate::moe::MoeMlp;
use crate::params::ParamLayoutBuilder;
use crate::{Cx, Result};

/// `x → x + attention(norm(x)) → x + experts(norm(x))`.
#[derive(Debug, Clone)]
pub struct Block {
    /// The attention sublayer.
    pub attention: SelfAttention,
    /// The expert sublayer.
    pub mlp: MoeMlp,
}

impl Block {
    /// Block `layer` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        dispatcher: DispatcherKind,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let attention = SelfAttention::new(params, config, layer, stage)?;
        let mlp = MoeMlp::new(params, config, dispatcher, layer, stage)?;
        Ok(Block { attention, mlp })
    }
}

type Saved<L, T, D> = <L as Layer<T, D>>::Saved;
type Deferred<L, T, D> = <L as Layer<T, D>>::Deferred;

impl<T: Float, D: Backend<T>> Layer<T, D> for Block {
    type Saved = (Saved<SelfAttention, T, D>, Saved<MoeMlp, T, D>);
    type Deferred = (Deferred<SelfAttention, T, D>, Deferred<MoeMlp, T, D>);

    fn forward(&self, m: u32, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<(Tensor<T, D>, Self::Saved)> {
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
        self.attention.backward_weight(m, attention, cx)
    }
}
