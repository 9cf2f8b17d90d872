//! Lookup in a block of the vocabulary.

use std::ops::Range;

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut, blocks};
use super::parallel::rows_per_piece;
use super::simd::simd;
use crate::check;
use crate::family::Embedding;
use crate::{Result, View, ViewMut};

/// Rows of the table that one task adds to; every task reads all ids.
const TABLE_ROWS: usize = 64;

/// The row of a block of the vocabulary, if it holds `id`.
fn row_in(block: &Range<usize>, id: i32) -> Option<usize> {
    usize::try_from(id).ok().filter(|id| block.contains(id)).map(|id| id - block.start)
}

simd! {
    fn add_rows<T>(
        dtable: MatMut<'_, T>,
        block: Range<usize>,
        dy: Mat<'_, T>,
        ids: &[i32],
        padding_idx: Option<usize>,
    ) {
        let padding = padding_idx.and_then(|id| id.checked_sub(block.start));
        for (i, &id) in ids.iter().enumerate() {
            if let Some(row) = row_in(&block, id).filter(|&row| Some(row) != padding) {
                for (d, &dy) in dtable.row(row).iter_mut().zip(dy.row(i)) {
                    *d += dy;
                }
            }
        }
    }
}

impl<T: CpuFloat> Embedding<T> for Cpu {
    fn embed(
        &self,
        mut y: ViewMut<'_, T, Self>,
        table: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()> {
        const KERNEL: &str = "embed";
        let [n, h] = y.shape();
        let [vocabulary, _] = table.shape();
        check::shape(KERNEL, "table", [vocabulary, h], table.shape())?;
        check::shape(KERNEL, "ids", [1, n], ids.shape())?;
        let (table, ids) = (Mat::from(table), Mat::from(ids).vector());
        let block = first..first + vocabulary;
        let mut y = MatMut::from(&mut y);
        let tasks = blocks(n, rows_per_piece(h)).map(|r| (y.take_rows(r.len()), &ids[r])).collect();
        self.for_each(tasks, |(mut y, ids): (MatMut<'_, T>, &[i32])| {
            for (i, &id) in ids.iter().enumerate() {
                match row_in(&block, id) {
                    Some(row) => y.row(i).copy_from_slice(table.row(row)),
                    None => y.row(i).fill(T::ZERO),
                }
            }
        })
    }

    fn embed_backward(
        &self,
        mut dtable: ViewMut<'_, T, Self>,
        dy: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
        padding_idx: Option<usize>,
    ) -> Result<()> {
        const KERNEL: &str = "embed_backward";
        let [n, h] = dy.shape();
        let [vocabulary, _] = dtable.shape();
        check::shape(KERNEL, "dtable", [vocabulary, h], dtable.shape())?;
        check::shape(KERNEL, "ids", [1, n], ids.shape())?;
        let (dy, ids) = (Mat::from(dy), Mat::from(ids).vector());
        let mut dtable = MatMut::from(&mut dtable);
        let tasks = blocks(vocabulary, TABLE_ROWS.max(vocabulary / 16))
            .map(|r| (dtable.take_rows(r.len()), first + r.start..first + r.end))
            .collect();
        self.for_each(tasks, |(dtable, block)| add_rows(dtable, block, dy, ids, padding_idx))
    }
}
