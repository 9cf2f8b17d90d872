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
    weights: Weights,
    /// Columns of queries and of keys on this rank.
    widths: [usize; 2],
    biases: Option<Biases>,
    norms: Option<Norms>,
    head_dim: usize,
}

/// How the weights of queries, keys and values are stored.
#[derive(Debug, Clone, Copy)]
enum Weights {
    /// One below the other, so that all are one product.
    Together(ParamId),
    /// Ranks that share KV heads sum gradients of keys and values, below each other here, over other ranks than those of queries.
    Apart { q: ParamId, kv: ParamId },
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
    /// Of queries, keys and values, beside each other.
    d: Tensor<T, D>,
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
        let shared = params.folding().size(Attention::TP_INNER) > 1;
        let queries = BiasPlace { sharded: Attention::TP, partial: CP_DP, stage };
        let keys = match shared {
            true => BiasPlace { sharded: Attention::TP_OUTER, partial: SHARED_KV, stage },
            false => queries,
        };
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
        let (q, k) = (weight("q_proj", heads, queries)?, weight("k_proj", kv_heads, keys)?);
        let v = weight("v_proj", kv_heads, keys)?;
        let weights = match shared {
            true => Weights::Apart { q: params.add(&[q])?, kv: params.add(&[k, v])? },
            false => Weights::Together(params.add(&[q, k, v])?),
        };
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
        let of_rank =
            |heads: usize, place: BiasPlace| heads / params.folding().size(place.sharded) * head_dim;
        let widths = [of_rank(heads, queries), of_rank(kv_heads, keys)];
        Ok(Qkv { weights, widths, biases, norms, head_dim })
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
        let ([q_width, kv_width], [both, all]) = (self.widths, self.ends());
        let values = kv_width..2 * kv_width;
        let project = |y: ViewMut<'_, T, D>, weight| device.gemm(y, rows.view(), Op::N, weight, Op::T);
        let mut raw = Tensor::uninit(device, n, both)?;
        let (mut q, mut kv) = (Tensor::uninit(device, n, q_width)?, Tensor::uninit(device, n, 2 * kv_width)?);
        let v_to = kv.view_mut()?.columns(values.clone())?;
        match self.weights {
            Weights::Together(id) => {
                let weight = cx.params.weight(id)?;
                project(raw.view_mut()?, weight.rows(0..both)?)?;
                project(v_to, weight.rows(both..all)?)?;
            }
            Weights::Apart { q, kv } => {
                let kv_weight = cx.params.weight(kv)?;
                project(raw.view_mut()?.columns(0..q_width)?, cx.params.weight(q)?)?;
                project(raw.view_mut()?.columns(q_width..both)?, kv_weight.rows(0..kv_width)?)?;
                project(v_to, kv_weight.rows(values.clone())?)?;
            }
        }
        if let Some(Biases { q, k, v }) = self.biases {
            q.add_to(raw.view_mut()?.columns(0..q_width)?, cx)?;
            k.add_to(raw.view_mut()?.columns(q_width..both)?, cx)?;
            v.add_to(kv.view_mut()?.columns(values)?, cx)?;
        }
        let (mut q_raw, mut k_raw) = (raw.columns(0..q_width)?, raw.columns(q_width..both)?);
        drop(raw);

        let (q_to, k_to) = (q.view_mut()?, kv.view_mut()?.columns(0..kv_width)?);
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
        let (q_width, [both, all], [n, hidden]) =
            (self.widths[0], self.ends(), [dq.shape()[0], h.shape()[1]]);
        let mut d = Tensor::uninit(&device, n, all)?;
        let turn = |to: ViewMut<'_, T, D>, dy: &Tensor<T, D>, cx: &Cx<T, D>| {
            cx.rope.apply(&device, to, dy.view(), self.head_dim, cx.batch(m)?, Rotation::Backward)
        };
        match (self.norms, norms) {
            (Some(Norms::Heads(norm)), Some(saved)) => {
                norm.backward(m, d.view_mut()?.columns(0..both)?, [dq.view(), dk.view()], saved, cx)?;
            }
            (Some(Norms::Projections(norm)), Some(saved)) => {
                let mut turned = Tensor::uninit(&device, n, both)?;
                turn(turned.view_mut()?.columns(0..q_width)?, &dq, cx)?;
                turn(turned.view_mut()?.columns(q_width..both)?, &dk, cx)?;
                let turned = [turned.columns(0..q_width)?, turned.columns(q_width..both)?];
                norm.backward(d.view_mut()?.columns(0..both)?, turned.each_ref(), saved, cx)?;
            }
            _ => {
                turn(d.view_mut()?.columns(0..q_width)?, &dq, cx)?;
                turn(d.view_mut()?.columns(q_width..both)?, &dk, cx)?;
            }
        }
        device.copy_rows(d.view_mut()?.columns(both..all)?, dv.view())?;

        let mut d_rows = Tensor::uninit(&device, n, hidden)?;
        let project = |d_rows: ViewMut<'_, T, D>, d: View<'_, T, D>, weight, cx: &Cx<T, D>| {
            Result::Ok(device.gemm(d_rows, d, Op::N, cx.params.weight(weight)?, Op::N)?)
        };
        match self.weights {
            Weights::Together(weight) => project(d_rows.view_mut()?, d.view(), weight, cx)?,
            Weights::Apart { q, kv } => {
                project(d_rows.view_mut()?, d.view().columns(0..q_width)?, q, cx)?;
                let mut d_rows_kv = Tensor::uninit(&device, n, hidden)?;
                project(d_rows_kv.view_mut()?, d.view().columns(q_width..all)?, kv, cx)?;
                device.add_assign(d_rows.view_mut()?, d_rows_kv.view())?;
            }
        }
        let dh = cx.group(Attention::TP)?.reduce_scatter_rows(&d_rows)?;
        Ok((dh, QkvDeferred { rows: rows.wait()?, d }))
    }

    /// Adds to the gradients of weights and biases.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: QkvDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let QkvDeferred { rows, d } = deferred;
        let (q_width, [both, all]) = (self.widths[0], self.ends());
        match self.weights {
            Weights::Together(weight) => {
                cx.params.add_product(weight, d.view(), Op::T, rows.view(), Op::N)?;
            }
            Weights::Apart { q, kv } => {
                let (dq, dkv) = (d.view().columns(0..q_width)?, d.view().columns(q_width..all)?);
                cx.params.add_product(q, dq, Op::T, rows.view(), Op::N)?;
                cx.params.add_product(kv, dkv, Op::T, rows.view(), Op::N)?;
            }
        }
        if let Some(Biases { q, k, v }) = self.biases {
            q.backward(&d.columns(0..q_width)?, cx)?;
            k.backward(&d.columns(q_width..both)?, cx)?;
            v.backward(&d.columns(both..all)?, cx)?;
        }
        Ok(())
    }

    /// Where keys and values end beside queries on this rank.
    fn ends(&self) -> [usize; 2] {
        let [q, kv] = self.widths;
        [q + kv, q + 2 * kv]
    }
}
