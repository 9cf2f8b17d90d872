//! Token embedding, vocabulary-parallel.

use moe_kernels::{Backend, Float, Tensor};
use moe_topology::{Attention, Owner, Placement};

use crate::axes::CP_DP;
use crate::config::ModelConfig;
use crate::params::{Init, Logical, Name, ParamId, ParamLayoutBuilder, Placed, Segment};
use crate::{Cx, PipelineLayout, Result};

/// Looks ids up in this rank's block of the table, then sums the blocks' results over TP while scattering the sequence.
#[derive(Debug, Clone, Copy)]
pub struct TokenEmbedding {
    segment: Segment,
    table: ParamId,
    first: usize,
    pad_token_id: Option<usize>,
}

/// The name of the embedding's matrix.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The matrix `[vocab, hidden]` of the embedding (`own_name` is its name) or of the head, vocabulary-parallel: its storage
/// and the first row of this rank's block; it is on pipeline rank `owner`. If the two are tied it is the embedding's, which the first and the last stage
/// own together: a copy each, also if both are on one rank, so that sums do not depend on where stages are.
pub(crate) fn vocabulary_matrix(
    params: &mut ParamLayoutBuilder<'_>,
    config: &ModelConfig,
    layout: &PipelineLayout,
    own_name: &str,
    owner: usize,
) -> Result<(ParamId, usize)> {
    let dims = [config.vocab_size, config.hidden_size];
    let [first, last] = layout.ends();
    let (name, owner) = match config.tie_word_embeddings {
        true => (EMBEDDING, Owner::Tied(first, last)),
        false => (own_name, Owner::Stage(owner)),
    };
    let placement = Placement::new(&dims, &[(0, Attention::TP)], CP_DP, owner)?;
    let first_row = placement.slice(params.folding(), params.rank())[0].start;
    let id = match params.find(name) {
        Some(id) if layout.stages() == 1 => params.share(id),
        Some(id) => params.copy(id),
        None => params.add(&[Logical {
            name: Name::One(name.to_owned()),
            placement: Placed::Attention(placement),
            init: Init::Normal(config.initializer_range),
        }])?,
    };
    Ok((id, first_row))
}

impl TokenEmbedding {
    /// On the first stage.
    ///
    /// # Errors
    /// The table `[vocab, hidden]` has more elements than can be counted.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        layout: &PipelineLayout,
    ) -> Result<Self> {
        let segment = params.begin_segment();
        let [owner, _] = layout.ends();
        let (table, first) = vocabulary_matrix(params, config, layout, EMBEDDING, owner)?;
        Ok(TokenEmbedding { segment, table, first, pad_token_id: config.pad_token_id })
    }

    /// `[tokens of this rank, hidden]` of micro-batch `m`.
    pub fn forward<T: Float, D: Backend<T>>(&self, m: u32, cx: &mut Cx<T, D>) -> Result<Tensor<T, D>> {
        cx.params.await_weights(self.segment)?;
        let ids = &cx.batch(m)?.ids;
        let table = cx.params.weight(self.table)?;
        let mut rows = Tensor::uninit(&cx.device, ids.shape()[1], table.shape()[1])?;
        cx.device.embed(rows.view_mut()?, table, ids.view(), self.first)?;
        Ok(cx.group(Attention::TP)?.reduce_scatter_rows(&rows)?)
    }

    /// The gradients of all rows of a micro-batch, gathered over TP: what the table's gradient needs.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        dy: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        Ok(cx.group(Attention::TP)?.all_gather_rows(dy)?)
    }

    /// Adds to the gradient of the table, but not to the row of `pad_token_id`.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        rows: &Tensor<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        let (device, ids) = (cx.device.clone(), cx.batch(m)?.ids.clone());
        let grad = cx.params.grad(self.table)?;
        device.embed_backward(grad, rows.view(), ids.view(), self.first, self.pad_token_id)?;
        cx.grads_added(self.segment, m)
    }
}
