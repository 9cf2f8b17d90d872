//! From rows to queries, keys and values of this rank's heads: projections, biases, norms, rotation.

use moe_kernels::family::{Op, Rotation};
use moe_kernels::{Backend, Device, Float, Tensor, View, ViewMut};
use moe_topology::{Attention, Owner, Placement};

use crate::axes::{CP_DP, SHARED_KV};
use crate::bias::{Bias, BiasPlace};
use crate::config::{ModelConfig, QkNormScope};
use crate::head_norm::HeadNorms;
use crate::norm::RmsNormSaved;
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::projection_norm::ProjectionNorms;
use crate::{Cx, Result};

/// `q = rope(norm(W_q h + b_q))`, `k = rope(norm(W_k h + b_k))`, `v = W_v h + b_v`, column-parallel: biases with
/// `attention_bias`, norms of each head or of all heads together with `use_qk_norm`.
///
/// With fewer KV heads than TP ranks, neighbouring ranks (the inner digit of TP) hold the same KV head and their gradients
/// are summed.
#[derive(Debug, Clone, Copy)]
pub struct Qkv {
    q: ParamId,
    kv: ParamId,
    biases: Option<Biases>,
    norms: Option<Norms>,
    head_dim: usize,
}

#[derive(Debug, Clone, Copy)]
struct Biases {
    q: Bias,
    k: Bias,
    v: Bias,
}

#[derive(Debug, Clone, Copy)]
enum Norms {
    /// Of each head, as one with the rotation.
    Heads(HeadNorms),
    /// Of all heads, before the rotation.
    Projections(ProjectionNorms),
}

/// What backward needs of a forward pass, besides its input.
#[derive(Debug)]
pub struct QkvSaved<T: Float, D: Device> {
    norms: Option<[RmsNormSaved<T, D>; 2]>,
}

/// Queries, keys beside values, and what backward needs.
pub type Projected<T, D, Saved> = (Tensor<T, D>, Tensor<T, D>, Saved);

/// What the weight gradients need.
#[derive(Debug)]
pub struct QkvDeferred<T: Float, D: Device> {
    rows: Tensor<T, D>,
    dq: Tensor<T, D>,
    dkv: Tensor<T, D>,
}

impl Qkv {
    /// The projections of the attention whose tensors are `{prefix}.…`, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        prefix: &str,
        stage: usize,
    ) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        // The inner digit of TP tells apart ranks that hold the same KV head (size 1 unless heads are fewer than TP).
        let queries = BiasPlace { sharded: Attention::TP, partial: CP_DP, stage };
        let keys = BiasPlace { sharded: Attention::TP_OUTER, partial: SHARED_KV, stage };
        let weight = |name: &str, heads: usize, place: BiasPlace| -> Result<Logical> {
            let (dims, shards) = ([heads * head_dim, hidden], [(0, place.sharded)]);
            Ok(Logical {
                name: Name::One(format!("{prefix}.{name}.weight")),
                placement: Placed::Attention(Placement::new(
                    &dims,
                    &shards,
                    place.partial,
                    Owner::Stage(stage),
                )?),
                init: Init::Normal(config.initializer_range),
            })
        };
        let q = params.add(&[weight("q_proj", heads, queries)?])?;
        let kv = params.add(&[weight("k_proj", kv_heads, keys)?, weight("v_proj", kv_heads, keys)?])?;
        let mut bias =
            |name, heads: usize, place| Bias::new(params, prefix, &[name], heads * head_dim, place);
        let biases = match config.attention_bias {
            true => Some(Biases {
                q: bias("q_proj", heads, queries)?,
                k: bias("k_proj", kv_heads, keys)?,
                v: bias("v_proj", kv_heads, keys)?,
            }),
            false => None,
        };
        let norms = match (config.use_qk_norm, config.qk_norm_scope) {
            (false, _) => None,
            (true, QkNormScope::Head) => Some(Norms::Heads(HeadNorms::new(params, config, prefix, stage)?)),
            (true, QkNormScope::Projection) => {
                Some(Norms::Projections(ProjectionNorms::new(params, config, prefix, queries, keys)?))
            }
        };
        Ok(Qkv { q, kv, biases, norms, head_dim })
    }

    /// `h: [tokens of this rank, hidden]` of micro-batch `m`; returns `q: [n, heads · head_dim]` and, keys before values,
    /// `kv: [n, 2 · kv_heads · head_dim]` of the rows of all TP ranks and the heads of this one.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Projected<T, D, QkvSaved<T, D>>> {
        let (device, rows) = (&cx.device, cx.group(Attention::TP)?.all_gather_rows(h)?);
        let n = rows.shape()[0];
        let (q_weight, kv_weight) = (cx.params.weight(self.q)?, cx.params.weight(self.kv)?);
        let (q_width, kv_width) = (q_weight.shape()[0], kv_weight.shape()[0] / 2);
        let (keys, values) = (0..kv_width, kv_width..2 * kv_width);
        let project = |mut y: ViewMut<'_, T, D>, weight: View<'_, T, D>, bias: Option<Bias>| {
            device.gemm(y.reborrow(), rows.view(), Op::N, weight, Op::T)?;
            bias.map_or(Ok(()), |bias| bias.add_to(y, cx))
        };
        let [q_bias, k_bias, v_bias] = match self.biases {
            None => [None; 3],
            Some(Biases { q, k, v }) => [Some(q), Some(k), Some(v)],
        };
        let (mut q_raw, mut k_raw) =
            (Tensor::uninit(device, n, q_width)?, Tensor::uninit(device, n, kv_width)?);
        let (mut q, mut kv) = (Tensor::uninit(device, n, q_width)?, Tensor::uninit(device, n, 2 * kv_width)?);
        project(q_raw.view_mut()?, q_weight, q_bias)?;
        project(k_raw.view_mut()?, kv_weight.rows(keys.clone())?, k_bias)?;
        project(kv.view_mut()?.columns(values.clone())?, kv_weight.rows(values)?, v_bias)?;

        let (q_to, k_to) = (q.view_mut()?, kv.view_mut()?.columns(keys)?);
        let mut norms = None;
        match self.norms {
            Some(Norms::Heads(norm)) => norms = Some(norm.forward(m, [q_to, k_to], [q_raw, k_raw], cx)?),
            other => {
                if let Some(Norms::Projections(norm)) = other {
                    let saved;
                    ([q_raw, k_raw], saved) = norm.forward([q_raw, k_raw], cx)?;
                    norms = Some(saved);
                }
                let batch = cx.batch(m)?;
                cx.rope.apply(device, q_to, q_raw.view(), self.head_dim, batch, Rotation::Forward)?;
                cx.rope.apply(device, k_to, k_raw.view(), self.head_dim, batch, Rotation::Forward)?;
            }
        }
        Ok((q, kv, QkvSaved { norms }))
    }

    /// The gradient of `h`; adds to the gradients of the norms' weights.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        [dq, dk, dv]: [Tensor<T, D>; 3],
        h: Tensor<T, D>,
        saved: QkvSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, QkvDeferred<T, D>)> {
        let device = cx.device.clone();
        let QkvSaved { norms } = saved;
        let rows = cx.group(Attention::TP)?.start_all_gather_rows(&h)?;
        let ([n, q_width], kv_width, hidden) = (dq.shape(), dk.shape()[1], h.shape()[1]);
        let (mut dq_raw, mut dkv) =
            (Tensor::uninit(&device, n, q_width)?, Tensor::uninit(&device, n, 2 * kv_width)?);
        let (dq_to, dk_to) = (dq_raw.view_mut()?, dkv.view_mut()?.columns(0..kv_width)?);
        match (self.norms, norms) {
            (Some(Norms::Heads(norm)), Some(saved)) => {
                norm.backward(m, [dq_to, dk_to], [dq.view(), dk.view()], saved, cx)?;
            }
            (other, saved) => {
                let batch = cx.batch(m)?;
                cx.rope.apply(&device, dq_to, dq.view(), self.head_dim, batch, Rotation::Backward)?;
                cx.rope.apply(&device, dk_to, dk.view(), self.head_dim, batch, Rotation::Backward)?;
                if let (Some(Norms::Projections(norm)), Some(saved)) = (other, saved) {
                    let dk_turned = dkv.columns(0..kv_width)?;
                    let dk_raw;
                    [dq_raw, dk_raw] = norm.backward([&dq_raw, &dk_turned], saved, cx)?;
                    drop(dk_turned);
                    device.copy_rows(dkv.view_mut()?.columns(0..kv_width)?, dk_raw.view())?;
                }
            }
        }
        device.copy_rows(dkv.view_mut()?.columns(kv_width..2 * kv_width)?, dv.view())?;

        let mut d_rows = Tensor::uninit(&device, n, hidden)?;
        device.gemm(d_rows.view_mut()?, dq_raw.view(), Op::N, cx.params.weight(self.q)?, Op::N)?;
        let mut d_rows_kv = Tensor::uninit(&device, n, hidden)?;
        device.gemm(d_rows_kv.view_mut()?, dkv.view(), Op::N, cx.params.weight(self.kv)?, Op::N)?;
        device.add_assign(d_rows.view_mut()?, d_rows_kv.view())?;
        let dh = cx.group(Attention::TP)?.reduce_scatter_rows(&d_rows)?;
        Ok((dh, QkvDeferred { rows: rows.wait()?, dq: dq_raw, dkv }))
    }

    /// Adds to the gradients of weights and biases.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: QkvDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let QkvDeferred { rows, dq, dkv } = deferred;
        cx.params.add_product(self.q, dq.view(), Op::T, rows.view(), Op::N)?;
        cx.params.add_product(self.kv, dkv.view(), Op::T, rows.view(), Op::N)?;
        if let Some(Biases { q, k, v }) = self.biases {
            let (width, both) = (dkv.shape()[1] / 2, dkv.shape()[1]);
            q.backward(&dq, cx)?;
            k.backward(&dkv.columns(0..width)?, cx)?;
            v.backward(&dkv.columns(width..both)?, cx)?;
        }
        Ok(())
    }
}
