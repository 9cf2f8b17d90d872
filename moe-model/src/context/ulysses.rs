//! From a part of the sequence with all heads to the whole with a part of the heads, and back (arXiv 2309.14509).

use std::ops::Range;

use moe_comm::{Comm, Pending};
use moe_kernels::family::Elementwise;
use moe_kernels::{Backend, Float, Tensor};
use moe_topology::Attention;

use super::zigzag;
use crate::Result;

/// An exchange of tensors that stand side by side, each of this many heads, among the ranks of an all-to-all group.
///
/// Rank `j` gets the `j`-th block of heads; with fewer heads than ranks, neighbours get the same one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    pub ranks: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl Exchange {
    /// Columns of one rank's heads.
    fn width(&self) -> usize {
        self.heads.div_ceil(self.ranks) * self.head_dim
    }

    /// Where rank `j`'s heads stand among all.
    fn columns(&self, j: usize) -> Range<usize> {
        let first = j * self.heads / self.ranks * self.head_dim;
        first..first + self.width()
    }

    /// Rows of each chunk: as rank `i` holds them, and in the order of the sequence.
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let (ranks, chunk) = (self.ranks, rows / (2 * self.ranks));
        let rows = move |index: usize| index * chunk..(index + 1) * chunk;
        let held = (0..ranks).flat_map(move |rank| zigzag(ranks, rank)).enumerate();
        held.map(move |(held, in_order)| (rows(held), rows(in_order)))
    }

    /// Starts the exchange of `parts`, each `[n, heads · head_dim]`.
    pub fn start_to_heads<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        comm: Comm<'_, Attention, D>,
        parts: &[Tensor<T, D>],
    ) -> Result<Pending<T, D>> {
        let (n, width) = (parts[0].shape()[0], self.width());
        let mut send = Tensor::uninit(device, self.ranks * n, parts.len() * width)?;
        for j in 0..self.ranks {
            for (p, part) in parts.iter().enumerate() {
                let to = send.view_mut()?.rows(j * n..(j + 1) * n)?.columns(p * width..(p + 1) * width)?;
                device.copy_rows(to, part.view().columns(self.columns(j))?)?;
            }
        }
        let rows = vec![n; self.ranks];
        Ok(comm.start_all_to_all_rows_v(&send, &rows, &rows)?)
    }

    /// What arrived, brought into the order of the sequence: `[ranks · n, parts · width]`, the parts side by
    /// side.
    pub fn finish_to_heads<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        received: &Tensor<T, D>,
    ) -> Result<Tensor<T, D>> {
        let [rows, cols] = received.shape();
        let mut sorted = Tensor::uninit(device, rows, cols)?;
        for (held, in_order) in self.chunks(rows) {
            device.copy_rows(sorted.view_mut()?.rows(in_order)?, received.view().rows(held)?)?;
        }
        Ok(sorted)
    }

    /// Starts the way back of `parts`, each `[ranks · n, width]` in the order of the sequence.
    pub fn start_to_rows<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        comm: Comm<'_, Attention, D>,
        parts: &[Tensor<T, D>],
    ) -> Result<Pending<T, D>> {
        let [rows, width] = parts[0].shape();
        let mut send = Tensor::uninit(device, rows, parts.len() * width)?;
        for (held, in_order) in self.chunks(rows) {
            for (p, part) in parts.iter().enumerate() {
                let to = send.view_mut()?.rows(held.clone())?.columns(p * width..(p + 1) * width)?;
                device.copy_rows(to, part.view().rows(in_order.clone())?)?;
            }
        }
        let rows = vec![rows / self.ranks; self.ranks];
        Ok(comm.start_all_to_all_rows_v(&send, &rows, &rows)?)
    }

    /// What came back: `[n, parts · heads · head_dim]`, the parts side by side. Where ranks have the same head, their
    /// parts are added.
    pub fn finish_to_rows<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        received: &Tensor<T, D>,
    ) -> Result<Tensor<T, D>> {
        let (n, width) = (received.shape()[0] / self.ranks, self.width());
        let parts = received.shape()[1] / width;
        let all = self.heads * self.head_dim;
        let blocks = (0..self.ranks).flat_map(|j| (0..parts).map(move |p| (j, p)));
        let blocks = blocks.map(|(j, p)| {
            let Range { start, end } = self.columns(j);
            let from = received.view().rows(j * n..(j + 1) * n)?.columns(p * width..(p + 1) * width)?;
            Ok::<_, crate::Error>((p * all + start..p * all + end, from))
        });
        let mut rows = Tensor::uninit(device, n, parts * all)?;
        if self.heads.is_multiple_of(self.ranks) {
            for block in blocks {
                let (columns, from) = block?;
                device.copy_rows(rows.view_mut()?.columns(columns)?, from)?;
            }
            return Ok(rows);
        }
        let mut sum = Tensor::<T::Acc, D>::zeros(device, n, parts * all)?;
        let mut wide = Tensor::<T::Acc, D>::uninit(device, n, width)?;
        for block in blocks {
            let (columns, from) = block?;
            device.widen(wide.view_mut()?, from)?;
            let sum = sum.view_mut()?.columns(columns)?;
            Elementwise::<T::Acc>::add_assign(device, sum, wide.view())?;
        }
        device.narrow(rows.view_mut()?, sum.view())?;
        Ok(rows)
    }
}
