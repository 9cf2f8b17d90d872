//! Keys and values around a ring (arXiv 2310.01889), over zig-zag chunks.
//!
//! Each transfer is started before the computation that it overlaps with, and awaited after it. In each step but the
//! first a rank computes one half of what it holds against the keys that have arrived: chunks that the mask hides are
//! never looked at, and all ranks do the same amount of work.

use std::cmp::Ordering;
use std::ops::Range;

use moe_comm::{Comm, Message, Pending};
use moe_kernels::family::{Attention, AttentionMask, AttentionShape, Elementwise};
use moe_kernels::{Device, Element, Float, Tensor, View, ViewMut};
use moe_topology::Attention as AttentionView;

use crate::{Error, Result};

/// Output and log-sum-exp.
type Attended<T, D> = (Tensor<T, D>, Tensor<<T as Float>::Acc, D>);

/// One rank's place in a ring, and the shape of the block of its own queries and keys.
pub(super) struct Ring<'a, D: Device> {
    pub comm: Comm<'a, AttentionView, D>,
    pub device: &'a D,
    pub shape: AttentionShape,
    /// For each step, the first key that each query sees, if documents are separated.
    pub first_keys: Option<&'a [Tensor<i32, D>]>,
}

/// What is computed of one rank's queries against another's keys: ranges of positions as they are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    pub mask: AttentionMask,
}

impl Block {
    /// Queries of `rank` against keys of `holder`, who hold chunks `r` and `2R − 1 − r` in the shape `own`.
    ///
    /// For `holder < rank` the order is `holder, rank, 2R−1−rank, 2R−1−holder`: both chunks of queries see the first chunk
    /// of keys and not the second. For `holder > rank` it is `rank, holder, 2R−1−holder, 2R−1−rank`: the second chunk of
    /// queries sees both.
    pub fn between(rank: usize, holder: usize, own: &AttentionShape) -> Self {
        let (len, half) = (own.q_len, own.q_len / 2);
        match holder.cmp(&rank) {
            Ordering::Equal => Block { queries: 0..len, keys: 0..len, mask: own.mask },
            Ordering::Less => Block { queries: 0..len, keys: 0..half, mask: AttentionMask::Full },
            Ordering::Greater => Block { queries: half..len, keys: 0..len, mask: AttentionMask::Full },
        }
    }
}

/// What a message holds; with the step, its tag.
#[derive(Debug, Clone, Copy)]
enum Cargo {
    KeysAndValues = 0,
    TheirGradients = 1,
}

/// A tensor on its way to the next rank, and the one that comes from the rank before.
struct Transfer<T: Element, D: Device> {
    sent: Pending<T, D>,
    received: Pending<T, D>,
}

impl<T: Element, D: Device> Transfer<T, D> {
    fn wait(self) -> Result<Tensor<T, D>> {
        self.sent.wait()?;
        Ok(self.received.wait()?)
    }
}

impl<D: Device> Ring<'_, D> {
    /// Sends `x` to the next rank and receives as much from the one before.
    fn pass_on<T: Element>(&self, x: &Tensor<T, D>, cargo: Cargo, step: usize) -> Result<Transfer<T, D>> {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        let [rows, cols] = x.shape();
        let tag = 2 * step as u64 + cargo as u64;
        let pending = self.comm.start_messages(vec![
            Message::Send { to: (rank + 1) % size, tag, tensor: x.clone() },
            Message::Recv { from: (rank + size - 1) % size, tag, rows, cols },
        ])?;
        match <[_; 2]>::try_from(pending) {
            Ok([sent, received]) => Ok(Transfer { sent, received }),
            Err(_) => unreachable!("as many operations are pending as were started"),
        }
    }

    /// Sends keys and values on for step `step`, unless it would be the first again.
    fn pass_keys<T: Element>(&self, kv: &Tensor<T, D>, step: usize) -> Result<Option<Transfer<T, D>>> {
        let goes_on = step < self.comm.size();
        goes_on.then(|| self.pass_on(kv, Cargo::KeysAndValues, step)).transpose()
    }

    /// The block of step `step`, in which the keys of the rank that many places before are here.
    fn block(&self, step: usize) -> Block {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        Block::between(rank, (rank + size - step) % size, &self.shape)
    }

    fn rows(&self, positions: &Range<usize>) -> Range<usize> {
        positions.start * self.shape.batch..positions.end * self.shape.batch
    }

    /// Where keys, and values, stand in `kv`.
    fn columns(&self) -> [Range<usize>; 2] {
        let AttentionShape { kv_heads, head_dim, v_head_dim, .. } = self.shape;
        let keys = kv_heads * head_dim;
        [0..keys, keys..keys + kv_heads * v_head_dim]
    }

    fn block_shape(&self, block: &Block) -> AttentionShape {
        let (q_len, kv_len) = (block.queries.len(), block.keys.len());
        AttentionShape { q_len, kv_len, mask: block.mask, ..self.shape }
    }

    /// The first keys of the queries of a block.
    fn first_keys(&self, step: usize, block: &Block) -> Result<Option<View<'_, i32, D>>> {
        let Some(steps) = self.first_keys else { return Ok(None) };
        let (got, ranks) = (steps.len(), self.comm.size());
        let keys = steps.get(step).ok_or(Error::DocumentSteps { got, ranks })?;
        Ok(Some(keys.view().columns(self.rows(&block.queries))?))
    }

    /// Output and log-sum-exp of the block of a step.
    fn attend<T: Float>(&self, q: &Tensor<T, D>, kv: &Tensor<T, D>, step: usize) -> Result<Attended<T, D>>
    where
        D: Attention<T>,
    {
        let block = self.block(step);
        let q = q.view().rows(self.rows(&block.queries))?;
        let kv = kv.view().rows(self.rows(&block.keys))?;
        let (n, heads) = (q.shape()[0], self.shape.heads);
        let mut o = Tensor::uninit(self.device, n, heads * self.shape.v_head_dim)?;
        let mut lse = Tensor::uninit(self.device, n, heads)?;
        let [keys, values] = self.columns();
        let (k, v) = (kv.columns(keys)?, kv.columns(values)?);
        let (first_keys, shape) = (self.first_keys(step, &block)?, self.block_shape(&block));
        self.device.attention(o.view_mut()?, lse.view_mut()?, q, k, v, first_keys, &shape)?;
        Ok((o, lse))
    }

    /// `q: [n, heads · head_dim]`, `kv: [n, kv_heads · (head_dim + v_head_dim)]`; returns `o: [n, heads · v_head_dim]` and the
    /// log-sum-exp over all keys.
    pub fn forward<T: Float>(&self, q: &Tensor<T, D>, kv: &Tensor<T, D>) -> Result<Attended<T, D>>
    where
        D: Attention<T> + Elementwise<T>,
    {
        let mut incoming = self.pass_keys(kv, 1)?;
        let (own, mut lse) = self.attend(q, kv, 0)?;
        if incoming.is_none() {
            return Ok((own, lse));
        }
        let mut sum = self.widened(&own)?;
        let mut step = 1;
        while let Some(transfer) = incoming {
            let kv = transfer.wait()?;
            incoming = self.pass_keys(&kv, step + 1)?;
            let block = self.block(step);
            let (part, part_lse) = self.attend(q, &kv, step)?;
            let rows = self.rows(&block.queries);
            self.device.attention_merge(
                sum.view_mut()?.rows(rows.clone())?,
                lse.view_mut()?.rows(rows)?,
                part.view(),
                part_lse.view(),
                self.shape.v_head_dim,
            )?;
            step += 1;
        }
        Ok((self.narrowed(&sum)?, lse))
    }

    /// The gradients of `q`, and of keys and values. The latter travel behind what they belong to and gather each rank's
    /// part, its own first, until they are home.
    pub fn backward<T: Float>(
        &self,
        d_o: &Tensor<T, D>,
        q: &Tensor<T, D>,
        kv: &Tensor<T, D>,
        o: &Tensor<T, D>,
        lse: &Tensor<T::Acc, D>,
    ) -> Result<[Tensor<T, D>; 3]>
    where
        D: Attention<T> + Elementwise<T> + Elementwise<T::Acc>,
    {
        let attend = |kv: &Tensor<T, D>, step: usize| self.attend_backward(d_o, q, kv, o, lse, step);
        let mut incoming = self.pass_keys(kv, 1)?;
        let [own_dq, own_dk, own_dv] = attend(kv, 0)?;
        if incoming.is_none() {
            return Ok([own_dq, own_dk, own_dv]);
        }
        let [k_columns, v_columns] = self.columns();
        let mut dq = self.widened(&own_dq)?;
        let mut dkv = Tensor::uninit(self.device, kv.shape()[0], kv.shape()[1])?;
        self.device.widen(dkv.view_mut()?.columns(k_columns.clone())?, own_dk.view())?;
        self.device.widen(dkv.view_mut()?.columns(v_columns.clone())?, own_dv.view())?;
        let mut behind = self.pass_on(&dkv, Cargo::TheirGradients, 1)?;
        let mut step = 1;
        while let Some(transfer) = incoming {
            let kv = transfer.wait()?;
            incoming = self.pass_keys(&kv, step + 1)?;
            let block = self.block(step);
            let [part_dq, part_dk, part_dv] = attend(&kv, step)?;
            self.add(dq.view_mut()?.rows(self.rows(&block.queries))?, &part_dq)?;
            let mut dkv = behind.wait()?;
            let keys = self.rows(&block.keys);
            self.add(dkv.view_mut()?.rows(keys.clone())?.columns(k_columns.clone())?, &part_dk)?;
            self.add(dkv.view_mut()?.rows(keys)?.columns(v_columns.clone())?, &part_dv)?;
            step += 1;
            behind = self.pass_on(&dkv, Cargo::TheirGradients, step)?;
        }
        let dkv = self.narrowed(&behind.wait()?)?;
        let (dk, dv) = (dkv.columns(k_columns)?, dkv.columns(v_columns)?);
        Ok([self.narrowed(&dq)?, dk, dv])
    }

    /// The part that the block of a step has of the gradients of its queries, keys and values.
    fn attend_backward<T: Float>(
        &self,
        d_o: &Tensor<T, D>,
        q: &Tensor<T, D>,
        kv: &Tensor<T, D>,
        o: &Tensor<T, D>,
        lse: &Tensor<T::Acc, D>,
        step: usize,
    ) -> Result<[Tensor<T, D>; 3]>
    where
        D: Attention<T>,
    {
        let block = self.block(step);
        let queries = self.rows(&block.queries);
        let kv = kv.view().rows(self.rows(&block.keys))?;
        let ([k_columns, v_columns], keys) = (self.columns(), kv.shape()[0]);
        let mut dq = Tensor::uninit(self.device, queries.len(), q.shape()[1])?;
        let mut dk = Tensor::uninit(self.device, keys, k_columns.len())?;
        let mut dv = Tensor::uninit(self.device, keys, v_columns.len())?;
        self.device.attention_backward(
            dq.view_mut()?,
            dk.view_mut()?,
            dv.view_mut()?,
            d_o.view().rows(queries.clone())?,
            q.view().rows(queries.clone())?,
            kv.columns(k_columns)?,
            kv.columns(v_columns)?,
            o.view().rows(queries.clone())?,
            lse.view().rows(queries)?,
            self.first_keys(step, &block)?,
            &self.block_shape(&block),
        )?;
        Ok([dq, dk, dv])
    }

    /// Adds `x` in the accumulation type.
    fn add<T: Float>(&self, mut sum: ViewMut<'_, T::Acc, D>, x: &Tensor<T, D>) -> Result<()>
    where
        D: Elementwise<T> + Elementwise<T::Acc>,
    {
        let wide = self.widened(x)?;
        Ok(Elementwise::<T::Acc>::add_assign(self.device, sum.reborrow(), wide.view())?)
    }

    fn widened<T: Float>(&self, x: &Tensor<T, D>) -> Result<Tensor<T::Acc, D>>
    where
        D: Elementwise<T>,
    {
        let [rows, cols] = x.shape();
        let mut wide = Tensor::uninit(self.device, rows, cols)?;
        self.device.widen(wide.view_mut()?, x.view())?;
        Ok(wide)
    }

    fn narrowed<T: Float>(&self, x: &Tensor<T::Acc, D>) -> Result<Tensor<T, D>>
    where
        D: Elementwise<T>,
    {
        let [rows, cols] = x.shape();
        let mut narrow = Tensor::uninit(self.device, rows, cols)?;
        self.device.narrow(narrow.view_mut()?, x.view())?;
        Ok(narrow)
    }
}
