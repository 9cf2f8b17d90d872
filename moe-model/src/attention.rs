//! Causal self-attention with grouped-query heads, rotary positions, tensor parallelism and sequence parallelism.

use moe_kernels::family::{AttentionMask, AttentionShape, Op, Rotation};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::axes::{CP_DP, SHARED_KV};
use crate::config::ModelConfig;
use crate::layer::Layer;
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// `y = x + W_o · attention(rope(W_q h), rope(W_k h), W_v h)` with `h = norm(x)`.
///
/// Rows are gathered over TP before the column-parallel projections and reduce-scattered after the row-parallel one.
/// With fewer KV heads than TP ranks, neighbouring ranks (the inner digit of TP) hold the same KV head and their
/// gradients are summed.
#[derive(Debug, Clone, Copy)]
pub struct SelfAttention {
    norm: RmsNorm,
    q: ParamId,
    kv: ParamId,
    out: ParamId,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub struct SelfAttentionSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    rows: Tensor<T, D>,
    q: Tensor<T, D>,
    k: Tensor<T, D>,
    v: Tensor<T, D>,
    o: Tensor<T, D>,
    lse: Tensor<T::Acc, D>,
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct SelfAttentionDeferred<T: Float, D: Device> {
    rows: Tensor<T, D>,
    dq: Tensor<T, D>,
    dkv: Tensor<T, D>,
    o: Tensor<T, D>,
    dy: Tensor<T, D>,
}

impl SelfAttention {
    /// The attention of layer `layer` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        layer: usize,
        stage: usize,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{layer}");
        let hidden = config.hidden_size;
        let head_dim = config.head_dim();
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let folding = params.folding();
        let norm = RmsNorm::new(
            params,
            format!("{prefix}.input_layernorm.weight"),
            hidden,
            config.rms_norm_eps,
            stage,
        )?;
        let std = config.initializer_range;
        let logical = |name: &str,
                       dims: [usize; 2],
                       shard: (usize, Axes<Attention>),
                       partial,
                       std|
         -> Result<Logical> {
            Ok(Logical {
                name: Name::One(format!("{prefix}.self_attn.{name}.weight")),
                placement: Placed::Attention(Placement::new(&dims, &[shard], partial, Owner::Stage(stage))?),
                init: Init::Normal(std),
            })
        };
        let q =
            params.add(&[logical("q_proj", [heads * head_dim, hidden], (0, Attention::TP), CP_DP, std)?])?;
        // The inner digit of TP tells apart ranks that hold the same KV head (size 1 unless heads are fewer than TP).
        let (kv_axes, kv_partial) = (Attention::TP_OUTER, SHARED_KV);
        let kv = params.add(&[
            logical("k_proj", [kv_heads * head_dim, hidden], (0, kv_axes), kv_partial, std)?,
            logical("v_proj", [kv_heads * head_dim, hidden], (0, kv_axes), kv_partial, std)?,
        ])?;
        let out_std = config.residual_std();
        let out = params.add(&[logical(
            "o_proj",
            [hidden, heads * head_dim],
            (1, Attention::TP),
            CP_DP,
            out_std,
        )?])?;
        Ok(SelfAttention {
            norm,
            q,
            kv,
            out,
            heads: heads / folding.size(Attention::TP),
            kv_heads: kv_heads / folding.size(kv_axes),
            head_dim,
        })
    }

    fn shape(&self, batch: usize, seq_len: usize) -> AttentionShape {
        AttentionShape {
            batch,
            q_len: seq_len,
            kv_len: seq_len,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).sqrt().recip(),
            mask: AttentionMask::Causal,
        }
    }
}

impl<T: Float, D: Backend<T>> Layer<T, D> for SelfAttention {
    type Saved = SelfAttentionSaved<T, D>;
    type Deferred = SelfAttentionDeferred<T, D>;

    fn forward(&self, m: u32, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<(Tensor<T, D>, Self::Saved)> {
        let device = cx.device.clone();
        let (h, norm) = self.norm.forward(x.clone(), cx)?;
        let tp = cx.group(Attention::TP)?;
        let rows = tp.all_gather_rows(&h)?;
        let [n, hidden] = rows.shape();
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);

        let mut q_raw = Tensor::uninit(&device, n, q_width)?;
        device.gemm(q_raw.view_mut()?, rows.view(), Op::N, cx.params.weight(self.q)?, Op::T)?;
        let mut kv = Tensor::uninit(&device, n, 2 * kv_width)?;
        device.gemm(kv.view_mut()?, rows.view(), Op::N, cx.params.weight(self.kv)?, Op::T)?;

        let batch = cx.batch(m)?;
        let mut q = Tensor::uninit(&device, n, q_width)?;
        cx.rope.apply(&device, q.view_mut()?, q_raw.view(), batch, Rotation::Forward)?;
        let mut k = Tensor::uninit(&device, n, kv_width)?;
        cx.rope.apply(&device, k.view_mut()?, kv.view().columns(0..kv_width)?, batch, Rotation::Forward)?;
        let v = kv.columns(kv_width..2 * kv_width)?;

        let mut o = Tensor::uninit(&device, n, q_width)?;
        let mut lse = Tensor::uninit(&device, n, self.heads)?;
        let shape = self.shape(batch.batch, batch.seq_len);
        device.attention(o.view_mut()?, lse.view_mut()?, q.view(), k.view(), v.view(), &shape)?;

        let mut partial = Tensor::uninit(&device, n, hidden)?;
        device.gemm(partial.view_mut()?, o.view(), Op::N, cx.params.weight(self.out)?, Op::T)?;
        let attended = tp.reduce_scatter_rows(&partial)?;
        let mut y = Tensor::uninit(&device, x.shape()[0], hidden)?;
        device.add(y.view_mut()?, x.view(), attended.view())?;
        Ok((y, SelfAttentionSaved { norm, rows, q, k, v, o, lse }))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Tensor<T, D>,
        saved: Self::Saved,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Self::Deferred)> {
        let device = cx.device.clone();
        let SelfAttentionSaved { norm, rows, q, k, v, o, lse } = saved;
        let tp = cx.group(Attention::TP)?;
        let dy_rows = tp.all_gather_rows(&dy)?;
        let [n, hidden] = dy_rows.shape();
        let (q_width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);

        let mut d_o = Tensor::uninit(&device, n, q_width)?;
        device.gemm(d_o.view_mut()?, dy_rows.view(), Op::N, cx.params.weight(self.out)?, Op::N)?;

        let batch = cx.batch(m)?;
        let shape = self.shape(batch.batch, batch.seq_len);
        let mut dq_rotated = Tensor::uninit(&device, n, q_width)?;
        let mut dk_rotated = Tensor::uninit(&device, n, kv_width)?;
        let mut dkv = Tensor::uninit(&device, n, 2 * kv_width)?;
        device.attention_backward(
            dq_rotated.view_mut()?,
            dk_rotated.view_mut()?,
            dkv.view_mut()?.columns(kv_width..2 * kv_width)?,
            d_o.view(),
            q.view(),
            k.view(),
            v.view(),
            o.view(),
            lse.view(),
            &shape,
        )?;
        let mut dq = Tensor::uninit(&device, n, q_width)?;
        cx.rope.apply(&device, dq.view_mut()?, dq_rotated.view(), batch, Rotation::Backward)?;
        cx.rope.apply(
            &device,
            dkv.view_mut()?.columns(0..kv_width)?,
            dk_rotated.view(),
            batch,
            Rotation::Backward,
        )?;

        let mut d_rows = Tensor::uninit(&device, n, hidden)?;
        device.gemm(d_rows.view_mut()?, dq.view(), Op::N, cx.params.weight(self.q)?, Op::N)?;
        let mut d_rows_kv = Tensor::uninit(&device, n, hidden)?;
        device.gemm(d_rows_kv.view_mut()?, dkv.view(), Op::N, cx.params.weight(self.kv)?, Op::N)?;
        device.add_assign(d_rows.view_mut()?, d_rows_kv.view())?;
        let dh = tp.reduce_scatter_rows(&d_rows)?;
        let mut dx = self.norm.backward(&dh, norm, cx)?;
        device.add_assign(dx.view_mut()?, dy.view())?;
        Ok((dx, SelfAttentionDeferred { rows, dq, dkv, o, dy: dy_rows }))
    }

    fn backward_weight(&self, _m: u32, deferred: Self::Deferred, cx: &mut Cx<T, D>) -> Result<()> {
        let SelfAttentionDeferred { rows, dq, dkv, o, dy } = deferred;
        let device = &cx.device;
        device.gemm_acc(cx.params.grad(self.q)?, dq.view(), Op::T, rows.view(), Op::N)?;
        device.gemm_acc(cx.params.grad(self.kv)?, dkv.view(), Op::T, rows.view(), Op::N)?;
        device.gemm_acc(cx.params.grad(self.out)?, dy.view(), Op::T, o.view(), Op::N)?;
        Ok(())
    }
}
