//! RMSNorm of each head of queries and of keys, with the rotation that follows.

use moe_kernels::{Backend, Float, Tensor, View, ViewMut};

use crate::config::ModelConfig;
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::ParamLayoutBuilder;
use crate::{Cx, Result};

/// Weights `[head_dim]` that are on every rank: each TP rank sees other heads, so their gradients are partial over TP too. (Ranks that
/// share a KV head see other queries of it: their gradients of the head are partial, so these are as well.)
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms {
    q: RmsNorm,
    k: RmsNorm,
    head_dim: usize,
}

impl HeadNorms {
    /// `{prefix}.q_norm.weight` and `{prefix}.k_norm.weight` on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        prefix: &str,
        stage: usize,
    ) -> Result<Self> {
        let head_dim = config.head_dim();
        let mut norm = |name: &str| {
            RmsNorm::new(params, format!("{prefix}.{name}.weight"), head_dim, config.rms_norm_eps, stage)
        };
        Ok(HeadNorms { q: norm("q_norm")?, k: norm("k_norm")?, head_dim })
    }

    /// Queries and keys of micro-batch `m` after norms and rotation: `q: [n, heads · head_dim]`, `k: [n, kv_heads · head_dim]`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        [q, k]: [ViewMut<'_, T, D>; 2],
        [q_raw, k_raw]: [Tensor<T, D>; 2],
        cx: &Cx<T, D>,
    ) -> Result<[RmsNormSaved<T, D>; 2]> {
        let (rope, positions) = (&cx.rope, cx.batch(m)?.rotary_positions().view());
        let of = |norm: RmsNorm, y: ViewMut<'_, T, D>, x: Tensor<T, D>| {
            let ([n, width], head) = (x.shape(), rope.head(self.head_dim));
            let mut rstd = Tensor::uninit(&cx.device, 1, n * width / self.head_dim)?;
            let (r, w, cos, sin) =
                (rstd.view_mut()?, cx.params.weight(norm.weight)?, rope.cos.view(), rope.sin.view());
            cx.device.rms_norm_rope(y, r, x.view(), w, cos, sin, positions, head, norm.eps)?;
            Result::Ok(RmsNormSaved { x, rstd })
        };
        Ok([of(self.q, q, q_raw)?, of(self.k, k, k_raw)?])
    }

    /// The gradients of what was normed, those of queries beside those of keys in `d`; adds to those of the weights.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        mut d: ViewMut<'_, T, D>,
        [dq, dk]: [View<'_, T, D>; 2],
        [q, k]: [RmsNormSaved<T, D>; 2],
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let (device, rope) = (cx.device.clone(), cx.rope.clone());
        let positions = cx.batch(m)?.rotary_positions().clone();
        let mut of = |norm: RmsNorm, dx: ViewMut<'_, T, D>, dy, saved: RmsNormSaved<T, D>| {
            let (weight, grad) = cx.params.weight_and_grad(norm.weight)?;
            let (x, rstd, head) = (saved.x.view(), saved.rstd.view(), rope.head(self.head_dim));
            let (cos, sin, positions) = (rope.cos.view(), rope.sin.view(), positions.view());
            device.rms_norm_rope_backward(dx, grad, dy, x, weight, rstd, cos, sin, positions, head)?;
            Result::Ok(())
        };
        let (q_width, both) = (dq.shape()[1], d.shape()[1]);
        of(self.q, d.reborrow().columns(0..q_width)?, dq, q)?;
        of(self.k, d.columns(q_width..both)?, dk, k)
    }
}
