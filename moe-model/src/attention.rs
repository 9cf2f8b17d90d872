//! Causal self-attention, grouped-query or latent, with rotary positions, tensor, sequence and context parallelism.

use moe_kernels::family::{AttentionMask, Op};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::axes::{CP_DP, TP_CP_DP};
use crate::bias::{Bias, BiasPlace};
use crate::cache::LayerCache;
use crate::config::ModelConfig;
use crate::context::{ContextAttention, ContextAttentionInputs, ContextAttentionSaved, Heads};
use crate::layer::{Hidden, Layer, Passed};
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::projections::{Projections, ProjectionsDeferred, ProjectionsSaved};
use crate::recompute::{RecomputeModule, RecomputeModules};
use crate::{Cx, Error, Result};

/// `y = x + W_o · attention(q, k, v)`, with [`q, k, v`](Projections) of `norm(x)`; each query sees the keys up to its own, of
/// these the last `sliding_window` if that is set.
///
/// Rows, or their latents, are gathered over TP before the column-parallel projections and reduce-scattered after the
/// row-parallel one. Backward gathers again, so that no rank keeps the rows of others.
#[derive(Debug, Clone, Copy)]
pub struct SelfAttention {
    norm: RmsNorm,
    qkv: Projections,
    out: ParamId,
    out_bias: Option<Bias>,
    core: ContextAttention,
    keep_normed: bool,
    keep_core: bool,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub struct SelfAttentionSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    /// Absent if backward makes it again.
    h: Option<Tensor<T, D>>,
    qkv: ProjectionsSaved<T, D>,
    core: CoreSaved<T, D>,
}

/// The attention itself: its output and what backward needs of it, or what it starts from.
#[derive(Debug)]
enum CoreSaved<T: Float, D: Device> {
    Whole { o: Tensor<T, D>, core: ContextAttentionSaved<T, D> },
    Inputs(ContextAttentionInputs<T, D>),
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct SelfAttentionDeferred<T: Float, D: Device> {
    qkv: ProjectionsDeferred<T, D>,
    o: Tensor<T, D>,
    dy: Tensor<T, D>,
}

impl SelfAttention {
    /// The attention of layer `layer` on pipeline stage `stage`.
    ///
    /// # Errors
    /// [`Error::WindowOnRing`], [`Error::Heads`]; a size of the model does not divide.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        recompute: RecomputeModules,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{layer}");
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (hidden, latent) = (config.hidden_size, config.latent_attention());
        let (head_dim, v_head_dim) = match latent {
            Some(latent) => (latent.qk_head_dim(), latent.v_head_dim),
            None => (config.head_dim(), config.head_dim()),
        };
        let folding = params.folding();
        let mask = match (config.sliding_window, folding.size(Attention::CP_OUTER)) {
            (None, _) => AttentionMask::Causal,
            (Some(window), 1) => AttentionMask::SlidingWindow { window },
            (Some(window), ranks) => return Err(Error::WindowOnRing { window, ranks }),
        };
        let norm = RmsNorm::new(
            params,
            format!("{prefix}.input_layernorm.weight"),
            hidden,
            config.rms_norm_eps,
            stage,
        )?;
        let qkv = Projections::new(params, config, &format!("{prefix}.self_attn"), stage)?;
        let dims = [hidden, heads * v_head_dim];
        let placement = Placement::new(&dims, &[(1, Attention::TP)], CP_DP, Owner::Stage(stage))?;
        let out = params.add(&[Logical {
            name: Name::One(format!("{prefix}.self_attn.o_proj.weight")),
            placement: Placed::Attention(placement),
            init: Init::Normal(config.residual_std()),
        }])?;
        let out_bias = (config.attention_bias && latent.is_some())
            .then(|| {
                let place = BiasPlace { sharded: Axes::NONE, partial: TP_CP_DP, stage };
                Bias::new(params, &format!("{prefix}.self_attn"), &["o_proj"], hidden, place)
            })
            .transpose()?;
        let folding = params.folding();
        let heads = Heads {
            heads: heads / folding.size(Attention::TP),
            kv_heads: kv_heads / folding.size(Attention::TP_OUTER),
            head_dim,
            v_head_dim,
            scale: config.attention_scale(),
        };
        let core = ContextAttention::new(heads, mask, folding)?;
        let keep_normed = !recompute.contains(RecomputeModule::Layernorm);
        let keep_core = !recompute.contains(RecomputeModule::CoreAttn);
        Ok(SelfAttention { norm, qkv, out, out_bias, core, keep_normed, keep_core })
    }

    /// The forward pass of tokens that follow those in `cache`, to which their keys and values are added; see
    /// [`ContextAttention::extend`].
    pub fn extend<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Hidden<T, D>,
        cache: LayerCache<'_, T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Hidden<T, D>> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let (q, kv, _) = self.qkv.forward(m, &h, cx)?;
        let o = self.core.extend(m, &q, &kv, cache, cx)?;
        self.add_output(norm.x, &o, cx)
    }

    /// Elements of a token's keys and values.
    pub fn kv_width(&self) -> usize {
        self.core.kv_width()
    }

    /// `x + W_o · o`, with the bias if there is one.
    fn add_output<T: Float, D: Backend<T>>(
        &self,
        x: Tensor<T, D>,
        o: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Hidden<T, D>> {
        let device = &cx.device;
        let mut partial = Tensor::uninit(device, o.shape()[0], x.shape()[1])?;
        device.gemm(partial.view_mut()?, o.view(), Op::N, cx.params.weight(self.out)?, Op::T)?;
        let attended = cx.group(Attention::TP)?.reduce_scatter_rows(&partial)?;
        let y = Hidden { x, added: Some(attended) };
        let Some(bias) = self.out_bias else { return Ok(y) };
        let mut y = y.sum(device)?;
        bias.add_to(y.view_mut()?, cx)?;
        Ok(y.into())
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for SelfAttention {
    type Saved = SelfAttentionSaved<T, D>;
    type Deferred = SelfAttentionDeferred<T, D>;

    fn forward(&self, m: u32, x: Hidden<T, D>, cx: &mut Cx<T, D>) -> Result<Passed<T, D, Self::Saved>> {
        let (h, norm) = self.norm.forward(x, cx)?;
        let (q, kv, qkv) = self.qkv.forward(m, &h, cx)?;
        let (o, core) = self.core.forward(m, q, kv, cx)?;
        let y = self.add_output(norm.x.clone(), &o, cx)?;
        let core = match self.keep_core {
            true => CoreSaved::Whole { o, core },
            false => CoreSaved::Inputs(core.into_inputs()),
        };
        Ok((y, SelfAttentionSaved { norm, h: self.keep_normed.then_some(h), qkv, core }))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let device = cx.device.clone();
        let SelfAttentionSaved { norm, h, qkv, core } = saved;
        let (o, core) = match core {
            CoreSaved::Whole { o, core } => (o, core),
            CoreSaved::Inputs(inputs) => self.core.attend(m, inputs, cx)?,
        };
        if let Some(bias) = self.out_bias {
            bias.backward(&dy, cx)?;
        }
        let dy_rows = cx.group(Attention::TP)?.all_gather_rows(&dy)?;

        let [n, q_width] = o.shape();
        let mut d_o = Tensor::uninit(&device, n, q_width)?;
        device.gemm(d_o.view_mut()?, dy_rows.view(), Op::N, cx.params.weight(self.out)?, Op::N)?;

        let gradients = self.core.backward(m, d_o, core, cx)?;
        let h = self.norm.output(h, &norm, cx)?;
        let (dh, qkv) = self.qkv.backward_input(m, gradients, h, qkv, cx)?;
        let dx = self.norm.backward(&dh, Some(&dy), norm, cx)?;
        Ok((dx, SelfAttentionDeferred { qkv, o, dy: dy_rows }))
    }

    fn backward_weight(&self, _m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        let SelfAttentionDeferred { qkv, o, dy } = deferred;
        self.qkv.backward_weight(qkv, cx)?;
        cx.params.add_product(self.out, dy.view(), Op::T, o.view(), Op::N)?;
        Ok(())
    }
}
