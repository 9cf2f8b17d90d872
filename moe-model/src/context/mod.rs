//! Context parallelism: attention over sequences that are cut over the CP ranks.
//!
//! A sequence is cut into `2·CP` chunks of which CP rank `c` holds `c` and `2·CP − 1 − c` ([`zigzag`]), so that all
//! ranks see equally many keys under a causal mask. CP is two digits, and attention crosses each in its own way:
//!
//! - **`CP_INNER`, all-to-all** (DeepSpeed-Ulysses, arXiv 2309.14509): what was cut by sequence becomes cut by head, and
//!   back.
//! - **`CP_OUTER`, ring** (arXiv 2310.01889): keys and values go round, results are merged by their log-sum-exp.
//!
//! The chunks that an all-to-all group holds together are two runs of the sequence, and these are the zig-zag chunks of a
//! ring of `CP_OUTER` ranks. So the two compose: the ring sees no difference between a rank and a group.

mod documents;
mod ring;
#[cfg(test)]
mod tests;
mod ulysses;

use moe_kernels::family::{AttentionMask, AttentionShape};
use moe_kernels::{Backend, Device, Float, Tensor};
use moe_topology::{Attention, Folding};

pub use self::documents::Documents;
use self::ring::Ring;
use self::ulysses::Exchange;
use crate::cache::LayerCache;
use crate::cx::MicroBatch;
use crate::{Cx, Error, Result};

/// The two chunks, of `2·ranks`, that `rank` holds, in this order.
pub const fn zigzag(ranks: usize, rank: usize) -> [usize; 2] {
    [rank, 2 * ranks - 1 - rank]
}

/// The positions of a sequence of `seq_len` tokens that `rank` of `cp` ranks holds, in order.
///
/// # Errors
/// [`Error::Chunks`] if the sequence cannot be cut into `2·cp` equal chunks.
pub fn positions(seq_len: usize, cp: usize, rank: usize) -> Result<impl Iterator<Item = usize>> {
    let chunks = 2 * cp;
    // One rank holds both halves, in order: the whole, of any length.
    if cp > 1 && !seq_len.is_multiple_of(chunks) {
        return Err(Error::Chunks { seq_len, chunks });
    }
    let start = move |chunk: usize| chunk * seq_len / chunks;
    Ok(zigzag(cp, rank).into_iter().flat_map(move |chunk| start(chunk)..start(chunk + 1)))
}

/// The heads of one tensor-parallel rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; a divisor of those of queries.
    pub kv_heads: usize,
    /// Size of a head of queries and keys.
    pub head_dim: usize,
    /// Size of a head of values.
    pub v_head_dim: usize,
    /// Factor on the scores.
    pub scale: f64,
}

/// Causal attention of the heads of one tensor-parallel rank over all ranks of its CP group.
#[derive(Debug, Clone, Copy)]
pub struct ContextAttention {
    heads: Heads,
    mask: AttentionMask,
    /// Ranks of an all-to-all.
    ulysses: usize,
}

/// What a forward pass starts from once heads are exchanged, as the ring sees it.
#[derive(Debug)]
pub struct ContextAttentionInputs<T: Float, D: Device> {
    q: Tensor<T, D>,
    kv: Tensor<T, D>,
}

/// What backward needs of a forward pass, as the ring saw it.
#[derive(Debug)]
pub struct ContextAttentionSaved<T: Float, D: Device> {
    inputs: ContextAttentionInputs<T, D>,
    o: Tensor<T, D>,
    lse: Tensor<T::Acc, D>,
}

impl<T: Float, D: Device> ContextAttentionSaved<T, D> {
    /// What the rest can be made from again.
    pub fn into_inputs(self) -> ContextAttentionInputs<T, D> {
        self.inputs
    }
}

impl ContextAttention {
    /// `mask` is that of the whole sequence, causal where there is a ring. The inner digit of CP, over which heads are cut
    /// further, must divide them; and divide the key-value heads or be a multiple of them: then several ranks get
    /// the same one, and their gradients are added.
    ///
    /// # Errors
    /// [`Error::Heads`] if they cannot be cut so.
    pub fn new(heads: Heads, mask: AttentionMask, folding: &Folding) -> Result<Self> {
        let ulysses = folding.size(Attention::CP_INNER);
        let Heads { heads: queries, kv_heads, .. } = heads;
        let shared = kv_heads > 0 && ulysses.is_multiple_of(kv_heads);
        if !queries.is_multiple_of(ulysses) || !(kv_heads.is_multiple_of(ulysses) || shared) {
            return Err(Error::Heads { heads: queries, kv_heads, ulysses });
        }
        Ok(ContextAttention { heads, mask, ulysses })
    }

    /// `q: [n, heads · head_dim]` and `kv: [n, kv_heads · (head_dim + v_head_dim)]`, keys before values, of this rank's tokens
    /// of micro-batch `m`; returns `o: [n, heads · v_head_dim]`.
    pub fn forward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        q: Tensor<T, D>,
        kv: Tensor<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, ContextAttentionSaved<T, D>)> {
        if self.ulysses == 1 {
            return self.attend(m, ContextAttentionInputs { q, kv }, cx);
        }
        let (device, comm) = (&cx.device, cx.group(Attention::CP_INNER)?);
        let (queries, keys) = (self.queries(), self.keys_and_values());
        let kv = keys.start_to_heads(device, comm, self.split(&kv)?)?;
        let q = queries.start_to_heads(device, comm, [q])?;
        let kv = keys.finish_to_heads(device, &kv.wait()?)?;
        let q = queries.finish_to_heads(device, &q.wait()?)?;
        self.attend(m, ContextAttentionInputs { q, kv }, cx)
    }

    /// A forward pass from the exchange of queries, keys and values on.
    pub fn attend<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        inputs: ContextAttentionInputs<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<(Tensor<T, D>, ContextAttentionSaved<T, D>)> {
        let (o, lse) = self.ring(m, cx)?.forward(&inputs.q, &inputs.kv)?;
        if self.ulysses == 1 {
            return Ok((o.clone(), ContextAttentionSaved { inputs, o, lse }));
        }
        let (device, outputs) = (&cx.device, self.outputs());
        let own = outputs.start_to_rows(device, cx.group(Attention::CP_INNER)?, [o.clone()])?;
        Ok((outputs.finish_to_rows(device, &own.wait()?)?, ContextAttentionSaved { inputs, o, lse }))
    }

    /// Attention without a backward pass, of tokens of micro-batch `m` that follow those in `cache`: shapes as in
    /// [`forward`](Self::forward). Their keys and values are put into the cache, behind those that are counted. For one
    /// rank of CP.
    pub fn extend<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        q: &Tensor<T, D>,
        kv: &Tensor<T, D>,
        cache: LayerCache<'_, T, D>,
        cx: &Cx<T, D>,
    ) -> Result<Tensor<T, D>> {
        let (device, micro_batch, LayerCache { kv: kept, len }) = (&cx.device, cx.batch(m)?, cache);
        let (batch, end) = (micro_batch.batch, len + micro_batch.seq_len);
        device.copy_rows(kept.view_mut()?.rows(len * batch..end * batch)?, kv.view())?;
        let first = match self.mask {
            AttentionMask::SlidingWindow { window } => (len + 1).saturating_sub(window),
            _ => 0,
        };
        let seen = kept.view().rows(first * batch..end * batch)?;
        let keys = self.heads.kv_heads * self.heads.head_dim;
        let (k, v) = (seen.columns(0..keys)?, seen.columns(keys..kv.shape()[1])?);
        let shape =
            AttentionShape { kv_len: end - first, first_query: len - first, ..self.shape(micro_batch) };
        let n = q.shape()[0];
        let mut o = Tensor::uninit(device, n, self.heads.heads * self.heads.v_head_dim)?;
        let mut lse = Tensor::uninit(device, n, self.heads.heads)?;
        device.attention(o.view_mut()?, lse.view_mut()?, q.view(), k, v, None, &shape)?;
        Ok(o)
    }

    /// Elements of keys and values of a token.
    pub fn kv_width(&self) -> usize {
        self.heads.kv_heads * (self.heads.head_dim + self.heads.v_head_dim)
    }

    /// The gradients of queries, keys and values.
    pub fn backward<T: Float, D: Backend<T>>(
        &self,
        m: u32,
        d_o: Tensor<T, D>,
        saved: ContextAttentionSaved<T, D>,
        cx: &Cx<T, D>,
    ) -> Result<[Tensor<T, D>; 3]> {
        let ContextAttentionSaved { inputs: ContextAttentionInputs { q, kv }, o, lse } = saved;
        let (device, ring) = (&cx.device, self.ring(m, cx)?);
        if self.ulysses == 1 {
            return ring.backward(&d_o, &q, &kv, &o, &lse);
        }
        let comm = cx.group(Attention::CP_INNER)?;
        let (queries, keys, outputs) = (self.queries(), self.keys_and_values(), self.outputs());
        let d_o = outputs.start_to_heads(device, comm, [d_o])?;
        let d_o = outputs.finish_to_heads(device, &d_o.wait()?)?;
        let [dq, dk, dv] = ring.backward(&d_o, &q, &kv, &o, &lse)?;
        let dkv = keys.start_to_rows(device, comm, [dk, dv])?;
        let dq = queries.start_to_rows(device, comm, [dq])?;
        let dkv = keys.finish_to_rows(device, &dkv.wait()?)?;
        let dq = queries.finish_to_rows(device, &dq.wait()?)?;
        let [dk, dv] = self.split(&dkv)?;
        Ok([dq, dk, dv])
    }

    /// Keys, and values.
    fn split<T: Float, D: Device>(&self, kv: &Tensor<T, D>) -> Result<[Tensor<T, D>; 2]> {
        let (keys, all) = (self.heads.kv_heads * self.heads.head_dim, kv.shape()[1]);
        Ok([kv.columns(0..keys)?, kv.columns(keys..all)?])
    }

    fn queries(&self) -> Exchange<1> {
        Exchange { ranks: self.ulysses, heads: self.heads.heads, head_dims: [self.heads.head_dim] }
    }

    fn outputs(&self) -> Exchange<1> {
        Exchange { ranks: self.ulysses, heads: self.heads.heads, head_dims: [self.heads.v_head_dim] }
    }

    fn keys_and_values(&self) -> Exchange<2> {
        let Heads { kv_heads, head_dim, v_head_dim, .. } = self.heads;
        Exchange { ranks: self.ulysses, heads: kv_heads, head_dims: [head_dim, v_head_dim] }
    }

    fn ring<'a, T: Float, D: Backend<T>>(&self, m: u32, cx: &'a Cx<T, D>) -> Result<Ring<'a, D>> {
        let batch = cx.batch(m)?;
        let first_keys = batch.documents.as_ref().map(|documents| documents.first_keys.as_slice());
        let (comm, shape) = (cx.group(Attention::CP_OUTER)?, self.shape(batch));
        Ok(Ring { comm, device: &cx.device, shape, first_keys })
    }

    /// The block of this rank's own queries and keys, as the ring sees it.
    fn shape<T: Float, D: Device>(&self, batch: &MicroBatch<T, D>) -> AttentionShape {
        let len = batch.seq_len * self.ulysses;
        AttentionShape {
            batch: batch.batch,
            q_len: len,
            kv_len: len,
            first_query: 0,
            heads: self.heads.heads / self.ulysses,
            kv_heads: self.heads.kv_heads.div_ceil(self.ulysses),
            head_dim: self.heads.head_dim,
            v_head_dim: self.heads.v_head_dim,
            scale: self.heads.scale,
            mask: self.mask,
        }
    }
}
