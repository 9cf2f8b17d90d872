//! From a part of the sequence with all heads to the whole with a part of the heads, and back (arXiv 2309.14509).

use std::ops::Range;

use moe_comm::{Comm, Pending};
use moe_kernels::family::Elementwise;
use moe_kernels::{Backend, Float, Tensor};
use moe_topology::Attention;

use super::zigzag;
use crate::Result;

/// An exchange of `P` tensors that stand side by side, each of this many heads, among the ranks of an all-to-all group.
///
/// Rank `j` gets the `j`-th block of heads; with fewer heads than ranks, neighbours get the same one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange<const P: usize> {
    pub ranks: usize,
    pub heads: usize,
    /// Size of a head of each tensor.
    pub head_dims: [usize; P],
}

impl<const P: usize> Exchange<P> {
    /// For each tensor, where `count` heads from `first` on stand among those of its kind.
    fn columns_of(&self, first: usize, count: usize) -> [Range<usize>; P] {
        self.head_dims.map(|dim| first * dim..(first + count) * dim)
    }

    /// For each tensor, where rank `j`'s heads stand among all.
    fn columns(&self, j: usize) -> [Range<usize>; P] {
        self.columns_of(j * self.heads / self.ranks, self.heads.div_ceil(self.ranks))
    }

    /// For each tensor, its columns among those of one rank's heads, side by side.
    fn own(&self) -> [Range<usize>; P] {
        side_by_side(self.columns_of(0, self.heads.div_ceil(self.ranks)))
    }

    /// For each tensor, its columns among those of all heads, side by side.
    fn all(&self) -> [Range<usize>; P] {
        side_by_side(self.columns_of(0, self.heads))
    }

    /// Rows of each chunk: as rank `i` holds them, and in the order of the sequence.
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<P> {
        let (ranks, chunk) = (self.ranks, rows / (2 * self.ranks));
        let rows = move |index: usize| index * chunk..(index + 1) * chunk;
        let held = (0..ranks).flat_map(move |rank| zigzag(ranks, rank)).enumerate();
        held.map(move |(held, in_order)| (rows(held), rows(in_order)))
    }

    /// Starts the exchange of `parts`, each `[n, heads · its head_dim]`.
    pub fn start_to_heads<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        comm: Comm<'_, Attention, D>,
        parts: [Tensor<T, D>; P],
    ) -> Result<Pending<T, D>> {
        let (n, own) = (parts[0].shape()[0], self.own());
        let mut send = Tensor::uninit(device, self.ranks * n, width(&own))?;
        for j in 0..self.ranks {
            for ((part, own), from) in parts.iter().zip(&own).zip(self.columns(j)) {
                let to = send.view_mut()?.rows(j * n..(j + 1) * n)?.columns(own.clone())?;
                device.copy_rows(to, part.view().columns(from)?)?;
            }
        }
        let rows = vec![n; self.ranks];
        Ok(comm.start_all_to_all_rows_v(&send, &rows, &rows)?)
    }

    /// What arrived, brought into the order of the sequence: `[ranks · n, …]`, the parts side by side.
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

    /// Starts the way back of `parts`, each `[ranks · n, own heads · its head_dim]` in the order of the sequence.
    pub fn start_to_rows<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        comm: Comm<'_, Attention, D>,
        parts: [Tensor<T, D>; P],
    ) -> Result<Pending<T, D>> {
        let (rows, own) = (parts[0].shape()[0], self.own());
        let mut send = Tensor::uninit(device, rows, width(&own))?;
        for (held, in_order) in self.chunks(rows) {
            for (part, own) in parts.iter().zip(&own) {
                let to = send.view_mut()?.rows(held.clone())?.columns(own.clone())?;
                device.copy_rows(to, part.view().rows(in_order.clone())?)?;
            }
        }
        let rows = vec![rows / self.ranks; self.ranks];
        Ok(comm.start_all_to_all_rows_v(&send, &rows, &rows)?)
    }

    /// What came back: `[n, heads · (sum of head_dims)]`, the parts side by side. Where ranks have the same head, their
    /// parts are added.
    pub fn finish_to_rows<T: Float, D: Backend<T>>(
        &self,
        device: &D,
        received: &Tensor<T, D>,
    ) -> Result<Tensor<T, D>> {
        let (n, own, all) = (received.shape()[0] / self.ranks, self.own(), self.all());
        let blocks = (0..self.ranks).flat_map(|j| (0..P).map(move |p| (j, p)));
        let blocks = blocks.map(|(j, p)| {
            let Range { start, end } = self.columns(j)[p];
            let from = received.view().rows(j * n..(j + 1) * n)?.columns(own[p].clone())?;
            Ok::<_, crate::Error>((all[p].start + start..all[p].start + end, from))
        });
        let mut rows = Tensor::uninit(device, n, width(&all))?;
        if self.heads.is_multiple_of(self.ranks) {
            for block in blocks {
                let (columns, from) = block?;
                device.copy_rows(rows.view_mut()?.columns(columns)?, from)?;
            }
            return Ok(rows);
        }
        let mut sum = Tensor::<T::Acc, D>::zeros(device, n, width(&all))?;
        for block in blocks {
            let (columns, from) = block?;
            let mut wide = Tensor::<T::Acc, D>::uninit(device, n, columns.len())?;
            device.widen(wide.view_mut()?, from)?;
            let sum = sum.view_mut()?.columns(columns)?;
            Elementwise::<T::Acc>::add_assign(device, sum, wide.view())?;
        }
        device.narrow(rows.view_mut()?, sum.view())?;
        Ok(rows)
    }
}

/// Each range moved behind the one before.
fn side_by_side<const P: usize>(ranges: [Range<usize>; P]) -> [Range<usize>; P] {
    let mut end = 0;
    ranges.map(|range| {
        let start = end;
        end += range.len();
        start..end
    })
}

/// Columns of ranges that stand side by side.
fn width(ranges: &[Range<usize>]) -> usize {
    ranges.last().map_or(0, |last| last.end)
}
