//! Final norm, language-model head and cross-entropy, vocabulary-parallel and in chunks of tokens.

#[cfg(test)]
mod tests;

use std::ops::Range;

use moe_comm::Reduction;
use moe_kernels::family::{Loss, Op};
use moe_kernels::{Backend, Device, Float, Tensor, ViewMut};
use moe_topology::Attention;

use crate::config::ModelConfig;
use crate::embedding::vocabulary_matrix;
use crate::norm::{RmsNorm, RmsNormSaved};
use crate::params::{ParamId, ParamLayoutBuilder, Segment};
use crate::{Cx, PipelineLayout, Result};

/// Bytes that a chunk's logits take at most on one rank, but for the least number of tokens: few beside what else a model keeps,
/// and yet so many tokens (2,048 in bf16 with 151,936 words) that on an H200 fewer chunks are not faster. Each chunk reads the
/// whole matrix and its gradient.
const CHUNK_BYTES: usize = 640 << 20;
/// Tokens of a chunk are a multiple of this where they are not all: whole tiles of a product.
const CHUNK_TOKENS: usize = 128;

/// The logits of one chunk of tokens and of this rank's vocabulary block are all that exist at a time; two numbers per token
/// are exchanged.
///
/// Derivatives of the objective by each token's loss are known beforehand (`scale` of a micro-batch), so a chunk's logits
/// become their gradient in place and are used up before the next chunk's are made (arXiv 2410.10989). Nothing of them is kept
/// or made again, but it is one pass, not two: in training it is [`backward`](Self::backward), which has the loss in it, and what
/// forward leaves to it is its input.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    segment: Segment,
    norm: RmsNorm,
    weight: ParamId,
    first: usize,
    /// Rows of the largest block of the matrix, ⌈V/TP⌉: the chunks of all ranks of TP are the same.
    largest_block: usize,
    chunk_bytes: usize,
}

/// Rows `[positions · sequences, hidden]` after the norm, gathered over TP, and what the norm's backward needs.
struct Normed<T: Float, D: Device> {
    rows: Tensor<T, D>,
    norm: RmsNormSaved<T, D>,
}

impl Head {
    /// On the last stage.
    ///
    /// # Errors
    /// The matrix `[vocab, hidden]` has more elements than can be counted.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        layout: &PipelineLayout,
    ) -> Result<Self> {
        let segment = params.begin_segment();
        let [_, owner] = layout.ends();
        let norm =
            RmsNorm::new(params, "model.norm.weight".into(), config.hidden_size, config.rms_norm_eps, owner)?;
        let (weight, first) = vocabulary_matrix(params, config, layout, "lm_head.weight", owner)?;
        let largest_block = config.vocab_size.div_ceil(params.folding().size(Attention::TP));
        Ok(Head { segment, norm, weight, first, largest_block, chunk_bytes: CHUNK_BYTES })
    }

    fn norm<T: Float, D: Backend<T>>(&self, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<Normed<T, D>> {
        cx.params.await_weights(self.segment)?;
        let (h, norm) = self.norm.forward(x, cx)?;
        Ok(Normed { rows: cx.group(Attention::TP)?.all_gather_rows(&h)?, norm })
    }

    /// This rank's block of the logits, whole: `[positions · sequences, vocab block]`.
    pub fn logits<T: Float, D: Backend<T>>(
        &self,
        x: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        let rows = self.norm(x, cx)?.rows;
        let weight = cx.params.weight(self.weight)?;
        let mut logits = Tensor::uninit(&cx.device, rows.shape()[0], weight.shape()[0])?;
        cx.device.gemm(logits.view_mut()?, rows.view(), Op::N, weight, Op::T)?;
        Ok(logits)
    }

    /// Adds Σ w·ce of micro-batch `m` to the context's sum. `x: [tokens of this rank, hidden]`.
    pub fn loss<T: Float, D: Backend<T>>(&self, m: u32, x: Tensor<T, D>, cx: &mut Cx<T, D>) -> Result<()> {
        let rows = self.norm(x, cx)?.rows;
        self.chunks(m, &rows, None, cx)
    }

    /// As [`loss`](Self::loss), and the gradient of `x`; adds to the gradients of the norm and of the matrix.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        x: Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        let Normed { rows, norm } = self.norm(x, cx)?;
        let [n, hidden] = rows.shape();
        let mut d_rows = Tensor::uninit(&cx.device, n, hidden)?;
        self.chunks(m, &rows, Some(&mut d_rows), cx)?;
        drop(rows);
        let dh = cx.group(Attention::TP)?.reduce_scatter_rows(&d_rows)?;
        drop(d_rows);
        let dx = self.norm.backward(&dh, None, norm, cx)?;
        cx.grads_added(self.segment, m)?;
        Ok(dx)
    }

    /// Tokens of a chunk of `n`: chunks are nearly equal, and the same on all ranks of TP.
    fn chunk_len<T: Float>(&self, n: usize) -> usize {
        let most = self.chunk_bytes / (self.largest_block * size_of::<T>()).max(1);
        let most = (most / CHUNK_TOKENS).max(1) * CHUNK_TOKENS;
        n.div_ceil(n.div_ceil(most).max(1)).max(1).next_multiple_of(CHUNK_TOKENS)
    }

    /// The loss of all rows, chunk by chunk, and where `d_rows` is given its gradients: theirs, partial over TP, and that of
    /// the matrix, which is added to.
    fn chunks<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        rows: &Tensor<T, D>,
        mut d_rows: Option<&mut Tensor<T, D>>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let device = cx.device.clone();
        let (n, block) = (rows.shape()[0], cx.params.weight(self.weight)?.shape()[0]);
        let len = self.chunk_len::<T>(n);
        let mut memory = Tensor::uninit(&device, len.min(n), block)?;
        if let Some(all) = &mut cx.logits {
            all.insert(m, Tensor::uninit(&device, n, block)?);
        }
        for start in (0..n).step_by(len) {
            let chunk = start..n.min(start + len);
            let rows = rows.view().rows(chunk.clone())?;
            let mut logits = memory.view_mut()?.rows(0..chunk.len())?;
            device.gemm(logits.reborrow(), rows, Op::N, cx.params.weight(self.weight)?, Op::T)?;
            if let Some(all) = cx.logits.as_mut().and_then(|all| all.get_mut(&m)) {
                device.copy_rows(all.view_mut()?.rows(chunk.clone())?, logits.as_view())?;
            }
            self.cross_entropy(m, chunk.clone(), logits.reborrow(), d_rows.is_some(), cx)?;
            if let Some(d_rows) = &mut d_rows {
                let d_rows = d_rows.view_mut()?.rows(chunk)?;
                device.gemm(d_rows, logits.as_view(), Op::N, cx.params.weight(self.weight)?, Op::N)?;
                cx.params.add_product(self.weight, logits.as_view(), Op::T, rows, Op::N)?;
            }
        }
        Ok(())
    }

    /// Adds the loss of a chunk to the context's sum; with `gradient`, logits become theirs.
    fn cross_entropy<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        chunk: Range<usize>,
        mut logits: ViewMut<'_, T, D>,
        gradient: bool,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let (device, n) = (cx.device.clone(), chunk.len());
        let batch = cx.batch(m)?;
        let labels = batch.labels.columns(chunk.clone())?;
        let [weights, scale] = [batch.weights.columns(chunk.clone())?, batch.scale.columns(chunk)?];
        let (mut lse, mut target) = (Tensor::uninit(&device, 1, n)?, Tensor::uninit(&device, 1, n)?);
        let tp = cx.group(Attention::TP)?;
        let (of_block, label) = (lse.view_mut()?, target.view_mut()?);
        if tp.size() == 1 && gradient {
            device.cross_entropy_whole(of_block, label, logits, labels.view(), scale.view())?;
        } else {
            device.cross_entropy(of_block, label, logits.as_view(), labels.view(), self.first)?;
            if tp.size() > 1 {
                let parts = tp.all_gather_rows(&lse)?;
                target = tp.all_reduce(&target, Reduction::Sum)?;
                lse = Tensor::uninit(&device, 1, n)?;
                Loss::<T>::merge_lse(&device, lse.view_mut()?, parts.view())?;
            }
            if gradient {
                let (labels, scale) = (labels.view(), scale.view());
                device.cross_entropy_backward(logits.reborrow(), lse.view(), labels, self.first, scale)?;
            }
        }
        Ok(cx.stats.loss.add(&device, weights.view(), lse.view(), target.view())?)
    }
}
