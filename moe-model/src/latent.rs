//! From hidden states through latents to queries, keys and values: multi-head latent attention.

use std::ops::Range;

use moe_kernels::family::{ColumnBlocks, Op, Rotation};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Attention, Axes, Owner, Placement};

use crate::axes::{CP_DP, TP_CP_DP};
use crate::bias::{Bias, BiasPlace};
use crate::config::{LatentAttention, ModelConfig};
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::qkv::Projected;
use crate::{Cx, Result};

/// Added to the mean square of latents, whatever `rms_norm_eps` is: so in DeepSeek's own code and in transformers.
const LATENT_EPS: f64 = 1e-6;

/// `q = [q_nope, rope(q_pe)]` of `W_qb norm(W_qa h)`, `k = [k_nope, rope(k_pe)]` and `v` with `k_nope, v` of
/// `W_kvb norm(c)` and `c, k_pe` of `W_kva h` (DeepSeek-V2, arXiv 2405.04434); `k_pe` is the same in all heads. Without
/// `q_lora_rank`, `q` is `W_q h`.
///
/// Each rank makes the latents of its own rows (sequence parallelism), so the gradients of the weights that make them are
/// partial over TP as well. Latents are gathered over TP, not hidden states, and projected to the rank's heads.
#[derive(Debug, Clone, Copy)]
pub struct LatentQkv {
    dims: LatentAttention,
    /// `q_a_proj` above `kv_a_proj_with_mqa`, or the latter alone.
    down: ParamId,
    q_norm: Option<RmsNorm>,
    kv_norm: RmsNorm,
    biases: Option<Biases>,
    /// `q_b_proj`, or `q_proj`.
    q: ParamId,
    kv: ParamId,
    /// Heads of this rank.
    heads: usize,
}

#[derive(Debug, Clone, Copy)]
struct Biases {
    q: Option<Bias>,
    kv: Bias,
}

/// What backward needs of a forward pass, besides its input.
#[derive(Debug)]
pub struct LatentQkvSaved<T: Float, D: Device> {
    q_norm: Option<RmsNormSaved<T, D>>,
    kv_norm: RmsNormSaved<T, D>,
    /// The latents of this rank's rows, as they are gathered.
    own: Tensor<T, D>,
}

/// What the weight gradients need.
#[derive(Debug)]
pub struct LatentQkvDeferred<T: Float, D: Device> {
    h: Tensor<T, D>,
    d_down: Tensor<T, D>,
    rows: Tensor<T, D>,
    dq: Tensor<T, D>,
    d_up: Tensor<T, D>,
}

/// Columns of three tensors side by side.
struct Columns {
    q: Range<usize>,
    kv: Range<usize>,
    k_pe: Range<usize>,
    width: usize,
}

impl Columns {
    fn new(q: usize, dims: &LatentAttention) -> Self {
        let (kv, width) = (q + dims.kv_lora_rank, q + dims.kv_lora_rank + dims.qk_rope_head_dim);
        Columns { q: 0..q, kv: q..kv, k_pe: kv..width, width }
    }
}

impl LatentQkv {
    /// The projections of the attention whose tensors are `{prefix}.…`, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        dims: LatentAttention,
        prefix: &str,
        stage: usize,
    ) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let weight = |name: &str, dims: [usize; 2], shards: &[(usize, Axes<Attention>)], partial| {
            Result::Ok(Logical {
                name: Name::One(format!("{prefix}.{name}.weight")),
                placement: Placed::Attention(Placement::new(&dims, shards, partial, Owner::Stage(stage))?),
                init: Init::Normal(config.initializer_range),
            })
        };
        let kv_a = dims.kv_lora_rank + dims.qk_rope_head_dim;
        let mut down = Vec::from_iter(dims.q_lora_rank.map(|rank| ("q_a_proj", rank)));
        down.push(("kv_a_proj_with_mqa", kv_a));
        let down = down
            .into_iter()
            .map(|(name, rows)| weight(name, [rows, hidden], &[], TP_CP_DP))
            .collect::<Result<Vec<_>>>()?;
        let down = params.add(&down)?;

        let mut norm = |name: &str, width| {
            RmsNorm::new(params, format!("{prefix}.{name}.weight"), width, LATENT_EPS, stage)
        };
        let q_norm = dims.q_lora_rank.map(|rank| norm("q_a_layernorm", rank)).transpose()?;
        let kv_norm = norm("kv_a_layernorm", dims.kv_lora_rank)?;
        let place = BiasPlace { sharded: Axes::NONE, partial: TP_CP_DP, stage };
        let mut bias = |name: &str, width| Bias::new(params, prefix, &[name], width, place);
        let biases = match config.attention_bias {
            true => Some(Biases {
                q: dims.q_lora_rank.map(|rank| bias("q_a_proj", rank)).transpose()?,
                kv: bias("kv_a_proj_with_mqa", kv_a)?,
            }),
            false => None,
        };

        let by_head: &[_] = &[(0, Attention::TP)];
        let (q_name, q_from) = match dims.q_lora_rank {
            Some(rank) => ("q_b_proj", rank),
            None => ("q_proj", hidden),
        };
        let q = params.add(&[weight(q_name, [heads * dims.qk_head_dim(), q_from], by_head, CP_DP)?])?;
        let up = [heads * (dims.qk_nope_head_dim + dims.v_head_dim), dims.kv_lora_rank];
        let kv = params.add(&[weight("kv_b_proj", up, by_head, CP_DP)?])?;
        let heads = heads / params.folding().size(Attention::TP);
        Ok(LatentQkv { dims, down, q_norm, kv_norm, biases, q, kv, heads })
    }

    /// `h: [tokens of this rank, hidden]` of micro-batch `m`; returns `q: [n, heads · (nope + rope)]` and, keys before
    /// values, `kv: [n, heads · (nope + rope + v)]` of the rows of all TP ranks and the heads of this one.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Projected<T, D, LatentQkvSaved<T, D>>> {
        let (device, [tokens, hidden]) = (&cx.device, h.shape());
        let down = Columns::new(self.dims.q_lora_rank.unwrap_or(0), &self.dims);
        let mut latents = Tensor::uninit(device, tokens, down.width)?;
        device.gemm(latents.view_mut()?, h.view(), Op::N, cx.params.weight(self.down)?, Op::T)?;
        if let Some(biases) = self.biases {
            if let Some(q) = biases.q {
                q.add_to(latents.view_mut()?.columns(down.q.clone())?, cx)?;
            }
            biases.kv.add_to(latents.view_mut()?.columns(down.kv.start..down.width)?, cx)?;
        }
        let (q_in, q_norm) = match self.q_norm {
            Some(norm) => {
                let (normed, saved) = norm.forward(latents.columns(down.q.clone())?, cx)?;
                (normed, Some(saved))
            }
            None => (h.clone(), None),
        };
        let (kv_in, kv_norm) = self.kv_norm.forward(latents.columns(down.kv.clone())?, cx)?;

        let up = Columns::new(self.dims.q_lora_rank.unwrap_or(hidden), &self.dims);
        let mut own = Tensor::uninit(device, tokens, up.width)?;
        device.copy_rows(own.view_mut()?.columns(up.q.clone())?, q_in.view())?;
        device.copy_rows(own.view_mut()?.columns(up.kv.clone())?, kv_in.view())?;
        device.copy_rows(own.view_mut()?.columns(up.k_pe.clone())?, latents.view().columns(down.k_pe)?)?;
        let rows = cx.group(Attention::TP)?.all_gather_rows(&own)?;
        let (q, kv) = self.expand(m, &rows, &up, cx)?;
        Ok((q, kv, LatentQkvSaved { q_norm, kv_norm, own }))
    }

    /// From all rows' latents to this rank's heads.
    fn expand<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        rows: &Tensor<T, D>,
        columns: &Columns,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, Tensor<T, D>)> {
        let (device, batch, n, heads) = (&cx.device, cx.batch(m)?, rows.shape()[0], self.heads);
        let LatentAttention { qk_nope_head_dim: nope, qk_rope_head_dim: rotated, v_head_dim: v, .. } =
            self.dims;
        let qk = nope + rotated;
        let mut q_raw = Tensor::uninit(device, n, heads * qk)?;
        let (q_in, q_weight) = (rows.view().columns(columns.q.clone())?, cx.params.weight(self.q)?);
        device.gemm(q_raw.view_mut()?, q_in, Op::N, q_weight, Op::T)?;
        let mut q = Tensor::uninit(device, n, heads * qk)?;
        cx.rope.apply(device, q.view_mut()?, q_raw.view(), qk, batch, Rotation::Forward)?;

        let mut up = Tensor::uninit(device, n, heads * (nope + v))?;
        let (kv_in, kv_weight) = (rows.view().columns(columns.kv.clone())?, cx.params.weight(self.kv)?);
        device.gemm(up.view_mut()?, kv_in, Op::N, kv_weight, Op::T)?;
        let mut k_pe = Tensor::uninit(device, n, rotated)?;
        let k_pe_raw = rows.view().columns(columns.k_pe.clone())?;
        cx.rope.apply(device, k_pe.view_mut()?, k_pe_raw, rotated, batch, Rotation::Forward)?;

        let mut kv = Tensor::uninit(device, n, heads * (qk + v))?;
        for (to, x, from, width) in [
            (self.keys(0), &up, self.up_keys(), nope),
            (self.keys(nope), &k_pe, ColumnBlocks { first: 0, step: 0 }, rotated),
            (ColumnBlocks { first: heads * qk, step: v }, &up, self.up_values(), v),
        ] {
            device.copy_column_blocks(kv.view_mut()?, to, x.view(), from, heads, width)?;
        }
        Ok((q, kv))
    }

    /// The gradient of `h`; adds to those of norms and biases.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        [dq, dk, dv]: [Tensor<T, D>; 3],
        h: Tensor<T, D>,
        saved: LatentQkvSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, LatentQkvDeferred<T, D>)> {
        let device = cx.device.clone();
        let LatentQkvSaved { q_norm, kv_norm, own } = saved;
        let rows = cx.group(Attention::TP)?.start_all_gather_rows(&own)?;
        let ([tokens, hidden], n, heads) = (h.shape(), dq.shape()[0], self.heads);
        let LatentAttention { qk_nope_head_dim: nope, qk_rope_head_dim: rotated, v_head_dim: v, .. } =
            self.dims;
        let qk = nope + rotated;
        let columns = Columns::new(self.dims.q_lora_rank.unwrap_or(hidden), &self.dims);
        let batch = cx.batch(m)?;
        let mut dq_raw = Tensor::uninit(&device, n, heads * qk)?;
        cx.rope.apply(&device, dq_raw.view_mut()?, dq.view(), qk, batch, Rotation::Backward)?;
        let mut d_up = Tensor::uninit(&device, n, heads * (nope + v))?;
        let own_values = ColumnBlocks { first: 0, step: v };
        device.copy_column_blocks(d_up.view_mut()?, self.up_keys(), dk.view(), self.keys(0), heads, nope)?;
        device.copy_column_blocks(d_up.view_mut()?, self.up_values(), dv.view(), own_values, heads, v)?;
        let mut dk_pe = Tensor::uninit(&device, n, rotated)?;
        device.sum_column_blocks(dk_pe.view_mut()?, dk.view(), self.keys(nope), heads)?;

        let mut d_rows = Tensor::uninit(&device, n, columns.width)?;
        let mut part = d_rows.view_mut()?;
        for (columns, dy, weight) in [(&columns.q, &dq_raw, self.q), (&columns.kv, &d_up, self.kv)] {
            let dx = part.reborrow().columns(columns.clone())?;
            device.gemm(dx, dy.view(), Op::N, cx.params.weight(weight)?, Op::N)?;
        }
        let d_k_pe_raw = part.columns(columns.k_pe.clone())?;
        cx.rope.apply(&device, d_k_pe_raw, dk_pe.view(), rotated, batch, Rotation::Backward)?;
        let d_own = cx.group(Attention::TP)?.reduce_scatter_rows(&d_rows)?;

        let down = Columns::new(self.dims.q_lora_rank.unwrap_or(0), &self.dims);
        let mut d_down = Tensor::uninit(&device, tokens, down.width)?;
        if let (Some(norm), Some(saved)) = (self.q_norm, q_norm) {
            let dx = norm.backward(&d_own.columns(columns.q.clone())?, None, saved, cx)?;
            device.copy_rows(d_down.view_mut()?.columns(down.q.clone())?, dx.view())?;
        }
        let dx = self.kv_norm.backward(&d_own.columns(columns.kv)?, None, kv_norm, cx)?;
        device.copy_rows(d_down.view_mut()?.columns(down.kv.clone())?, dx.view())?;
        let dk_pe = d_own.view().columns(columns.k_pe)?;
        device.copy_rows(d_down.view_mut()?.columns(down.k_pe)?, dk_pe)?;
        if let Some(biases) = self.biases {
            if let Some(q) = biases.q {
                q.backward(&d_down.columns(down.q)?, cx)?;
            }
            biases.kv.backward(&d_down.columns(down.kv.start..down.width)?, cx)?;
        }
        let mut dh = Tensor::uninit(&device, tokens, hidden)?;
        device.gemm(dh.view_mut()?, d_down.view(), Op::N, cx.params.weight(self.down)?, Op::N)?;
        if self.dims.q_lora_rank.is_none() {
            device.add_assign(dh.view_mut()?, d_own.view().columns(columns.q)?)?;
        }
        Ok((dh, LatentQkvDeferred { h, d_down, rows: rows.wait()?, dq: dq_raw, d_up }))
    }

    /// Adds to the gradients of the projections.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: LatentQkvDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let LatentQkvDeferred { h, d_down, rows, dq, d_up } = deferred;
        let columns = Columns::new(self.dims.q_lora_rank.unwrap_or(h.shape()[1]), &self.dims);
        let (q_in, kv_in) = (rows.columns(columns.q)?, rows.columns(columns.kv)?);
        for (weight, dy, x) in [(self.down, d_down, h), (self.q, dq, q_in), (self.kv, d_up, kv_in)] {
            cx.params.add_product(weight, dy.view(), Op::T, x.view(), Op::N)?;
        }
        Ok(())
    }

    /// In keys, what of each head begins at `at`.
    fn keys(&self, at: usize) -> ColumnBlocks {
        ColumnBlocks { first: at, step: self.dims.qk_head_dim() }
    }

    /// In the output of `kv_b_proj`, the part of each head that is a key's.
    fn up_keys(&self) -> ColumnBlocks {
        ColumnBlocks { first: 0, step: self.dims.qk_nope_head_dim + self.dims.v_head_dim }
    }

    /// In the output of `kv_b_proj`, the part of each head that is a value.
    fn up_values(&self) -> ColumnBlocks {
        ColumnBlocks { first: self.dims.qk_nope_head_dim, ..self.up_keys() }
    }
}
