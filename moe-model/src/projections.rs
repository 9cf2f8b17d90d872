//! From hidden states to queries, keys and values, of either kind of attention.

use moe_kernels::{Backend, Device, Float, Tensor};

use crate::config::ModelConfig;
use crate::latent::{LatentQkv, LatentQkvDeferred, LatentQkvSaved};
use crate::params::ParamLayoutBuilder;
use crate::qkv::{Projected, Qkv, QkvDeferred, QkvSaved};
use crate::{Cx, Error, Result};

/// What makes queries, keys and values: [`ModelConfig::latent_attention`] says which.
#[derive(Debug, Clone, Copy)]
pub enum Projections {
    /// Grouped-query attention.
    Grouped(Qkv),
    /// Multi-head latent attention.
    Latent(LatentQkv),
}

/// What backward needs of a forward pass, besides its input.
#[derive(Debug)]
pub enum ProjectionsSaved<T: Float, D: Device> {
    /// Of grouped-query attention.
    Grouped(QkvSaved<T, D>),
    /// Of multi-head latent attention.
    Latent(LatentQkvSaved<T, D>),
}

/// What the weight gradients need.
#[derive(Debug)]
pub enum ProjectionsDeferred<T: Float, D: Device> {
    /// Of grouped-query attention.
    Grouped(QkvDeferred<T, D>),
    /// Of multi-head latent attention.
    Latent(LatentQkvDeferred<T, D>),
}

impl Projections {
    /// Those of the attention whose tensors are `{prefix}.…`, on pipeline stage `stage`.
    pub fn new(
        params: &mut ParamLayoutBuilder<'_>,
        config: &ModelConfig,
        prefix: &str,
        stage: usize,
    ) -> Result<Self> {
        Ok(match config.latent_attention() {
            Some(dims) => Projections::Latent(LatentQkv::new(params, config, dims, prefix, stage)?),
            None => Projections::Grouped(Qkv::new(params, config, prefix, stage)?),
        })
    }

    /// `h: [tokens of this rank, hidden]` of micro-batch `m`; returns queries and, keys before values, `kv` of the rows of all
    /// TP ranks and the heads of this one.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        h: &Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Projected<T, D, ProjectionsSaved<T, D>>> {
        Ok(match self {
            Projections::Grouped(qkv) => {
                let (q, kv, saved) = qkv.forward(m, h, cx)?;
                (q, kv, ProjectionsSaved::Grouped(saved))
            }
            Projections::Latent(qkv) => {
                let (q, kv, saved) = qkv.forward(m, h, cx)?;
                (q, kv, ProjectionsSaved::Latent(saved))
            }
        })
    }

    /// The gradient of `h` from those of queries, keys and values; adds to those of small weights.
    pub fn backward_input<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        gradients: [Tensor<T, D>; 3],
        h: Tensor<T, D>,
        saved: ProjectionsSaved<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<(Tensor<T, D>, ProjectionsDeferred<T, D>)> {
        match (self, saved) {
            (Projections::Grouped(qkv), ProjectionsSaved::Grouped(saved)) => {
                let (dh, deferred) = qkv.backward_input(m, gradients, h, saved, cx)?;
                Ok((dh, ProjectionsDeferred::Grouped(deferred)))
            }
            (Projections::Latent(qkv), ProjectionsSaved::Latent(saved)) => {
                let (dh, deferred) = qkv.backward_input(m, gradients, h, saved, cx)?;
                Ok((dh, ProjectionsDeferred::Latent(deferred)))
            }
            _ => Err(Error::OtherLayer),
        }
    }

    /// Adds to the weight gradients.
    pub fn backward_weight<T: Float, D: Backend<T>>(
        &self,
        deferred: ProjectionsDeferred<T, D>,
        cx: &mut Cx<T, D>,
    ) -> Result<()> {
        match (self, deferred) {
            (Projections::Grouped(qkv), ProjectionsDeferred::Grouped(deferred)) => {
                qkv.backward_weight(deferred, cx)
            }
            (Projections::Latent(qkv), ProjectionsDeferred::Latent(deferred)) => {
                qkv.backward_weight(deferred, cx)
            }
            _ => Err(Error::OtherLayer),
        }
    }
}
