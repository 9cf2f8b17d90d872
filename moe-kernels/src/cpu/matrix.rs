//! Matrices in host memory: what a view is, once its kernel runs.

use std::ops::Range;

use faer::{ContiguousFwd, MatMut as FaerMut, MatRef as FaerRef};

use super::Cpu;
use crate::{Element, View, ViewMut};

/// A matrix to read, rows contiguous.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// A matrix to write, rows contiguous.
#[derive(Debug)]
pub(super) struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    stride: usize,
}

/// Elements from the first to one past the last.
#[inline(always)]
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a, T: Element> From<View<'a, T, Cpu>> for Mat<'a, T> {
    fn from(view: View<'a, T, Cpu>) -> Self {
        let l = view.layout();
        let data = if l.is_empty() { &[] } else { &view.buf().as_slice()[l.offset..l.offset + l.span()] };
        Mat { data, rows: l.rows, cols: l.cols, stride: l.stride.max(l.cols) }
    }
}

impl<'a, T: Element> From<&'a mut ViewMut<'_, T, Cpu>> for MatMut<'a, T> {
    fn from(view: &'a mut ViewMut<'_, T, Cpu>) -> Self {
        let l = view.layout();
        let data = if l.is_empty() {
            &mut []
        } else {
            &mut view.buf().as_mut_slice()[l.offset..l.offset + l.span()]
        };
        MatMut { data, rows: l.rows, cols: l.cols, stride: l.stride.max(l.cols) }
    }
}

impl<'a, T> Mat<'a, T> {
    /// A contiguous matrix.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat { data: &data[..rows * cols], rows, cols, stride: cols }
    }

    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> &'a [T] {
        if self.cols == 0 { &[] } else { &self.data[i * self.stride..][..self.cols] }
    }

    /// All rows, also where they have no elements.
    #[inline(always)]
    pub(super) fn iter(self) -> impl Iterator<Item = &'a [T]> + Clone
    where
        T: Copy,
    {
        (0..self.rows).map(move |i| self.row(i))
    }

    pub(super) fn row_range(self, r: Range<usize>) -> Self {
        let len = span(r.len(), self.cols, self.stride);
        let data = if len == 0 { &[] } else { &self.data[r.start * self.stride..][..len] };
        Mat { data, rows: r.len(), ..self }
    }

    pub(super) fn col_range(self, c: Range<usize>) -> Self {
        let len = span(self.rows, c.len(), self.stride);
        let data = if len == 0 { &[] } else { &self.data[c.start..][..len] };
        Mat { data, cols: c.len(), ..self }
    }

    /// The rows `first`, `first + step`, …, `count` of them: one sequence of sequence-major rows.
    pub(super) fn every(self, first: usize, step: usize, count: usize) -> Self {
        let stride = self.stride * step;
        let len = span(count, self.cols, stride);
        let data = if len == 0 { &[] } else { &self.data[first * self.stride..][..len] };
        Mat { data, rows: count, stride, ..self }
    }

    /// Its elements without gaps: worth it where they are read several times, since rows that are a power of two apart
    /// compete for the same lines of the cache.
    pub(super) fn packed(self) -> Vec<T>
    where
        T: Copy,
    {
        let mut packed = Vec::with_capacity(self.rows * self.cols);
        self.iter().for_each(|row| packed.extend_from_slice(row));
        packed
    }

    /// The elements of a `[1, n]` matrix.
    #[inline(always)]
    pub(super) fn vector(self) -> &'a [T] {
        debug_assert_eq!(self.rows, 1);
        self.data
    }

    /// For matrix products.
    pub(super) fn faer(self) -> FaerRef<'a, T> {
        FaerRef::from_row_major_slice_with_stride(self.data, self.rows, self.cols, self.stride)
    }
}

impl<'a, T> MatMut<'a, T> {
    /// A contiguous matrix.
    pub(super) fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        MatMut { data: &mut data[..rows * cols], rows, cols, stride: cols }
    }

    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    pub(super) fn row(&mut self, i: usize) -> &mut [T] {
        if self.cols == 0 { &mut [] } else { &mut self.data[i * self.stride..][..self.cols] }
    }

    /// Cuts the first `n` rows off.
    pub(super) fn take_rows(&mut self, n: usize) -> MatMut<'a, T> {
        let data = std::mem::take(&mut self.data);
        let (head, tail) = data.split_at_mut((n * self.stride).min(data.len()));
        let len = span(n, self.cols, self.stride);
        self.data = tail;
        self.rows -= n;
        MatMut { data: &mut head[..len], rows: n, cols: self.cols, stride: self.stride }
    }

    /// The elements of a `[1, n]` matrix.
    #[inline(always)]
    pub(super) fn vector(self) -> &'a mut [T] {
        debug_assert_eq!(self.rows, 1);
        self.data
    }

    /// For matrix products.
    pub(super) fn faer(self) -> FaerMut<'a, T> {
        // The row-major constructor with a stride of faer 0.24.4 swaps the strides.
        FaerMut::from_column_major_slice_with_stride_mut(self.data, self.cols, self.rows, self.stride)
            .transpose_mut()
    }

    /// Cuts sequence-major rows into the heads of each sequence, `[rows / batch, head_dim]` each: the heads of
    /// sequence 0, then those of sequence 1, and so on.
    pub(super) fn heads(self, batch: usize, head_dim: usize) -> Vec<Head<'a, T>> {
        let heads = self.cols / head_dim;
        let gap = self.stride - self.cols;
        // One position of all sequences is one row here, so that a head is a range of columns.
        let row = MatMut {
            rows: self.rows / batch,
            cols: span(batch, self.cols, self.stride),
            stride: self.stride * batch,
            data: self.data,
        };
        let mut rest = row.faer().try_as_row_major_mut().expect("the rows of a `MatMut` are contiguous");
        let mut parts = Vec::with_capacity(batch * heads);
        for b in 0..batch {
            if b > 0 {
                rest = rest.split_at_col_mut(gap).1;
            }
            for _ in 0..heads {
                let (head, tail) = rest.split_at_col_mut(head_dim);
                parts.push(Head(head));
                rest = tail;
            }
        }
        parts
    }
}

/// The rows of one head of one sequence, to write beside the other heads.
pub(super) struct Head<'a, T>(FaerMut<'a, T, usize, usize, isize, ContiguousFwd>);

impl<T> Head<'_, T> {
    #[inline(always)]
    pub(super) fn row(&mut self, i: usize) -> &mut [T] {
        self.0.as_mut().row_mut(i).as_slice_mut()
    }
}

/// Cuts `0..n` in blocks of `block`, the last one shorter.
pub(super) fn blocks(n: usize, block: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..n.div_ceil(block)).map(move |i| i * block..((i + 1) * block).min(n))
}

/// Cuts the first `n` elements off.
pub(super) fn take<'a, T>(slice: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(n);
    *slice = tail;
    head
}
