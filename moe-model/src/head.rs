//! Final norm, language-model head and cross-entropy, vocabulary-parallel.

use moe_comm::Reduction;
use moe_kernels::family::{Loss, Op};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::Attention;

use crate::config::ModelConfig;
use crate::embedding::vocabulary_matrix;
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{ParamId, ParamLayoutBuilder, Segment};
use crate::{Cx, Result};

/// Logits exist only as this rank's vocabulary block; two numbers per token are exchanged.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    segment: Segment,
    norm: RmsNorm,
    weight: ParamId,
    first: usize,
}

/// The logits of this rank's vocabulary block, `[positions · sequences, vocab block]`, with the normed rows, gathered over
/// TP, that they come from.
struct Projected<T: Float, D: Device> {
    logits: Tensor<T, D>,
    rows: Tensor<T, D>,
    norm: RmsNormSaved<T, D>,
}

/// What backward needs of a forward pass.
#[derive(Debug)]
pub struct HeadSaved<T: Float, D: Device> {
    norm: RmsNormSaved<T, D>,
    rows: Tensor<T, D>,
    logits: Tensor<T, D>,
    lse: Tensor<T::Acc, D>,
}

/// What the weight gradient needs.
#[derive(Debug)]
pub struct HeadDeferred<T: Float, D: Device> {
    rows: Tensor<T, D>,
    dlogits: Tensor<T, D>,
}

impl Head {
    /// On the last stage.
    pub fn new(params: &mut ParamLayoutBuilder<'_>, config: &ModelConfig, stage: usize) -> Result<Self> {
        let segment = params.begin_segment();
        let norm =
            RmsNorm::new(params, "model.norm.weight".into(), config.hidden_size, config.rms_norm_eps, stage)?;
        let (weight, first) = vocabulary_matrix(params, config, "lm_head.weight", stage)?;
        Ok(Head { segment, norm, weight, first })
    }

    fn project<T: Float, D: Backend<T>>(
        &self,
        x: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Projected<T, D>> {
        cx.params.await_weights(self.segment)?;
        let (h, norm) = self.norm.forward(x, cx)?;
        let rows = cx.group(Attention::TP)?.all_gather_rows(&h)?;
        let weight = cx.params.weight(self.weight)?;
        let mut logits = Tensor::uninit(&cx.device, rows.shape()[0], weight.shape()[0])?;
        cx.device.gemm(logits.view_mut()?, rows.view(), Op::N, weight, Op::T)?;
        Ok(Projected { logits, rows, norm })
    }

    /// This rank's block of the logits, `[positions · sequences, vocab block]`.
    pub fn logits<T: Float, D: Backend<T>>(
        &self,
        x: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        Ok(self.project(x, cx)?.logits)
    }

    /// Adds Σ w·ce of micro-batch `m` to the statistics.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<HeadSaved<T, D>> {
        let device = cx.device.clone();
        let Projected { logits, rows, norm } = self.project(x, cx)?;
        if let Some(all) = &mut cx.logits {
            all.insert(m, logits.clone());
        }
        let n = rows.shape()[0];
        let batch = cx.batch(m)?;
        let mut block_lse = Tensor::uninit(&device, 1, n)?;
        let mut block_target = Tensor::uninit(&device, 1, n)?;
        device.cross_entropy(
            block_lse.view_mut()?,
            block_target.view_mut()?,
            logits.view(),
            batch.labels.view(),
            self.first,
        )?;
        let tp = cx.group(Attention::TP)?;
        let parts = tp.all_gather_rows(&block_lse)?;
        let target = tp.all_reduce(&block_target, Reduction::Sum)?;
        let mut lse = Tensor::uninit(&device, 1, n)?;
        Loss::<T>::merge_lse(&device, lse.view_mut()?, parts.view())?;

        let mut sum = Tensor::<f64, D>::zeros(&device, 1, 1)?;
        device.dot(sum.view_mut()?, batch.weights.view(), lse.view())?;
        let mut sum_target = Tensor::<f64, D>::zeros(&device, 1, 1)?;
        device.dot(sum_target.view_mut()?, batch.weights.view(), target.view())?;
        cx.stats.loss += sum.to_vec(&device)?[0] - sum_target.to_vec(&device)?[0];
        Ok(HeadSaved { norm, rows, logits, lse })
    }

    /// The gradient of the last block's output.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        saved: HeadSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, HeadDeferred<T, D>)> {
        let device = cx.device.clone();
        let HeadSaved { norm, rows, logits, lse } = saved;
        let [n, block] = logits.shape();
        let batch = cx.batch(m)?;
        let mut dlogits = Tensor::uninit(&device, n, block)?;
        device.cross_entropy_backward(
            dlogits.view_mut()?,
            logits.view(),
            lse.view(),
            batch.labels.view(),
            self.first,
            batch.scale.view(),
        )?;
        let mut d_rows = Tensor::uninit(&device, n, rows.shape()[1])?;
        device.gemm(d_rows.view_mut()?, dlogits.view(), Op::N, cx.params.weight(self.weight)?, Op::N)?;
        let dh = cx.group(Attention::TP)?.reduce_scatter_rows(&d_rows)?;
        let dx = self.norm.backward(&dh, None, norm, cx)?;
        Ok((dx, HeadDeferred { rows, dlogits }))
    }

    /// Adds to the gradient of the head's matrix.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        deferred: HeadDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let HeadDeferred { rows, dlogits } = deferred;
        cx.params.add_product(self.weight, dlogits.view(), Op::T, rows.view(), Op::N)?;
        cx.grads_added(self.segment, m)
    }
}
