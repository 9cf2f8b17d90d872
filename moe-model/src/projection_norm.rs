//! RMSNorms over all heads of queries and over all heads of keys, which tensor parallelism spreads over ranks.

use moe_comm::Reduction;
use moe_kernels::{Backend, Float, Tensor, View, ViewMut};
use moe_topology::{Attention, Owner, Placement};

use crate::bias::BiasPlace;
use crate::config::ModelConfig;
use crate::norm::{NormedPair, RmsNormSaved};
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed};
use crate::{Cx, Result};

/// `q = norm(q)`, `k = norm(k)`, each over the whole projection (OLMoE, arXiv 2409.02060).
///
/// A row's means are over the columns of all TP ranks: one reduction of two numbers per row in each direction. Where ranks
/// share key-value heads they hold each equally often, so that the mean over all ranks' columns is that over the heads. In
/// backward these ranks have parts of a head's gradient: the mean of products, which is of all parts, divided by the columns
/// of all ranks, is what each of them owes, once per head over the ranks that share it.
#[derive(Debug, Clone, Copy)]
pub struct ProjectionNorms {
    q: ParamId,
    k: ParamId,
    eps: f64,
}

impl ProjectionNorms {
    /// `{prefix}.q_norm.weight`, `[heads · head_dim]`, and `{prefix}.k_norm.weight`, `[kv_heads · head_dim]`, which lie as the
    /// projections' biases do.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        prefix: &str,
        queries: BiasPlace,
        keys: BiasPlace,
    ) -> Result<Self> {
        let mut weight = |name: &str, heads: usize, place: BiasPlace| {
            let BiasPlace { sharded, partial, stage } = place;
            let dims = [heads * config.head_dim()];
            let placement = Placement::new(&dims, &[(0, sharded)], partial, Owner::Stage(stage))?;
            params.add(&[Logical {
                name: Name::One(format!("{prefix}.{name}.weight")),
                placement: Placed::Attention(placement),
                init: Init::Ones,
            }])
        };
        Ok(ProjectionNorms {
            q: weight("q_norm", config.num_attention_heads, queries)?,
            k: weight("k_norm", config.num_key_value_heads, keys)?,
            eps: config.rms_norm_eps,
        })
    }

    /// This rank's columns of normed queries and keys: `q: [n, heads · head_dim]`, `k: [n, kv_heads · head_dim]`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        [q, k]: [Tensor<T, D>; 2],
        cx: &Cx<T, D>,
    ) -> Result<NormedPair<T, D>> {
        let device = &cx.device;
        let sums = summed(
            q.shape()[0],
            cx,
            [&|sums| Ok(device.rms_norm_sums(sums, q.view())?), &|sums| {
                Ok(device.rms_norm_sums(sums, k.view())?)
            }],
        )?;
        let part = |x: Tensor<T, D>, weight: ParamId, sums: View<'_, T::Acc, D>| {
            let [n, width] = x.shape();
            let (mut y, mut rstd) = (Tensor::uninit(device, n, width)?, Tensor::uninit(device, 1, n)?);
            let (weight, whole) = (cx.params.weight(weight)?, width * cx.group(Attention::TP)?.size());
            device.rms_norm_part(y.view_mut()?, rstd.view_mut()?, x.view(), weight, sums, whole, self.eps)?;
            Result::Ok((y, RmsNormSaved { x, rstd }))
        };
        let (q, q_saved) = part(q, self.q, sums.view().rows(0..1)?)?;
        let (k, k_saved) = part(k, self.k, sums.view().rows(1..2)?)?;
        Ok(([q, k], [q_saved, k_saved]))
    }

    /// The gradients of what was normed, those of queries beside those of keys in `d`; adds to those of the weights.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        mut d: ViewMut<'_, T, D>,
        [dq, dk]: [&Tensor<T, D>; 2],
        [q, k]: [RmsNormSaved<T, D>; 2],
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let (device, whole) = (cx.device.clone(), cx.group(Attention::TP)?.size());
        let of = |sums: ViewMut<'_, T::Acc, D>, dy: &Tensor<T, D>, x: &Tensor<T, D>, weight: ParamId| {
            Ok(device.rms_norm_backward_sums(sums, dy.view(), x.view(), cx.params.weight(weight)?)?)
        };
        let sums = summed(
            dq.shape()[0],
            cx,
            [&|sums| of(sums, dq, &q.x, self.q), &|sums| of(sums, dk, &k.x, self.k)],
        )?;
        let mut part = |dx: ViewMut<'_, T, D>,
                        dy: &Tensor<T, D>,
                        saved: RmsNormSaved<T, D>,
                        weight: ParamId,
                        sums: View<'_, T::Acc, D>| {
            let (weight, grad) = cx.params.weight_and_grad(weight)?;
            let (x, rstd) = (saved.x.view(), saved.rstd.view());
            let whole = dy.shape()[1] * whole;
            Result::Ok(device.rms_norm_part_backward(dx, grad, dy.view(), x, weight, rstd, sums, whole)?)
        };
        let (q_width, both) = (dq.shape()[1], d.shape()[1]);
        part(d.reborrow().columns(0..q_width)?, dq, q, self.q, sums.view().rows(0..1)?)?;
        part(d.columns(q_width..both)?, dk, k, self.k, sums.view().rows(1..2)?)
    }
}

/// Writes one row of sums.
type Sums<'a, T, D> = &'a dyn Fn(ViewMut<'_, <T as Float>::Acc, D>) -> Result<()>;

/// `[2, n]`: the sums that `of` make of this rank's columns, added over TP.
fn summed<T: Float, D: Backend<T>>(
    n: usize,
    cx: &Cx<T, D>,
    of: [Sums<'_, T, D>; 2],
) -> Result<Tensor<T::Acc, D>> {
    let mut sums = Tensor::uninit(&cx.device, 2, n)?;
    for (row, of) in of.into_iter().enumerate() {
        of(sums.view_mut()?.rows(row..row + 1)?)?;
    }
    Ok(cx.group(Attention::TP)?.all_reduce(&sums, Reduction::Sum)?)
}
