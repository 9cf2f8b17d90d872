//! Keys and values of the tokens so far.

use moe_kernels::{Device, Float, Tensor};

use crate::{Error, Result};

/// What attention needs of the tokens that went through the layers of a stage before: their keys, rotated, and values. With
/// it [`DecoderStage::extend`](crate::DecoderStage::extend) computes the tokens after them alone.
///
/// Each layer has `kv_heads · (head_dim + v_head_dim)` elements for each position, allocated for all positions at once;
/// latent attention too, whose latents would be smaller but would have to be expanded again for each token.
#[derive(Debug)]
pub struct KvCache<T: Float, D: Device> {
    batch: usize,
    capacity: usize,
    len: usize,
    layers: Vec<Tensor<T, D>>,
}

/// The part of a layer: `kv: [capacity · batch, width]`, keys before values, rows as in a micro-batch, of which those of the
/// first `len` positions are filled.
#[derive(Debug)]
pub struct LayerCache<'a, T: Float, D: Device> {
    /// Keys and values.
    pub kv: &'a mut Tensor<T, D>,
    /// Positions that are filled.
    pub len: usize,
}

impl<T: Float, D: Device> KvCache<T, D> {
    /// Room for `capacity` positions of `batch` sequences in layers of these widths.
    pub(crate) fn new(
        device: &D,
        batch: usize,
        capacity: usize,
        widths: impl Iterator<Item = usize>,
    ) -> Result<Self> {
        let rows = batch.saturating_mul(capacity);
        let layers = widths.map(|width| Ok(Tensor::uninit(device, rows, width)?)).collect::<Result<_>>()?;
        Ok(KvCache { batch, capacity, len: 0, layers })
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Positions of each sequence that are there.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the positions from `len` on; the memory stays.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// That there is room for `added` positions more.
    pub(crate) fn check_room(&self, added: usize) -> Result<()> {
        let KvCache { len, capacity, .. } = *self;
        match added <= capacity - len {
            true => Ok(()),
            false => Err(Error::CacheFull { len, added, capacity }),
        }
    }

    /// The layers, in order.
    pub(crate) fn layers(&mut self) -> impl Iterator<Item = LayerCache<'_, T, D>> {
        let len = self.len;
        self.layers.iter_mut().map(move |kv| LayerCache { kv, len })
    }

    /// Counts positions that all layers have now.
    pub(crate) fn added(&mut self, positions: usize) {
        self.len += positions;
    }
}
