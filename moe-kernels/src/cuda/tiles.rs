//! Launches of kernels that go over a matrix element by element.

use super::Cuda;
use super::launch::Launch;
use super::vectors::vectors;
use crate::{Element, Layout, View, ViewMut};

/// Threads of a block.
const THREADS: usize = 256;

/// How blocks lie over a matrix, of which each thread has some consecutive columns of some rows. All operands that the kernel
/// reads or writes at the thread's place are named first: vectors are moved only where all of them lie on even addresses, and
/// where none of them has gaps, rows are made as long as a block is wide.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    shape: [usize; 2],
    /// Columns of a thread, and its rows.
    each: [usize; 2],
    vectors: bool,
    flat: bool,
}

/// `Tiles` of the prelude.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Argument {
    rows: i64,
    cols: i64,
    last: i64,
    across: i32,
    vectors: i32,
}

impl Tiles {
    /// Over a matrix of this shape, `[rows, cols]`; threads have `each` columns of `rows` rows.
    pub(super) fn new(shape: [usize; 2], each: usize, rows: usize) -> Self {
        Tiles { shape, each: [each, rows], vectors: true, flat: true }
    }

    /// With an operand of the same shape.
    pub(super) fn with<E: Element>(mut self, view: View<'_, E, Cuda>) -> Self {
        self.flat &= view.layout().is_contiguous();
        self.vectors &= vectors(view, self.each[0]);
        self
    }

    /// With an operand whose rows stand elsewhere, or are of another width.
    pub(super) fn with_other<E: Element>(mut self, view: View<'_, E, Cuda>) -> Self {
        self.flat = false;
        self.vectors &= vectors(view, self.each[0]);
        self
    }

    /// Vectors only if they do not cross from one block of columns to the next.
    pub(super) fn only_within(mut self, columns: &[usize]) -> Self {
        self.vectors &= columns.iter().all(|columns| columns.is_multiple_of(self.each[0]));
        self
    }

    /// An operand to read: `const E *`, `i64` row stride.
    pub(super) fn mat<'a, E: Element>(&self, launch: Launch<'a>, view: View<'_, E, Cuda>) -> Launch<'a> {
        launch.vector(view).size(self.stride(view.layout()))
    }

    /// An operand to write: `E *`, `i64` row stride.
    pub(super) fn mat_mut<'a, E: Element>(
        &self,
        launch: Launch<'a>,
        view: &mut ViewMut<'_, E, Cuda>,
    ) -> Launch<'a> {
        let stride = self.stride(view.layout());
        launch.vector_mut(view).size(stride)
    }

    fn stride(&self, layout: Layout) -> usize {
        if self.flat { THREADS * self.each[0] } else { layout.stride }
    }

    /// The last argument, `Tiles`, and the grid.
    pub(super) fn argument<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let [mut rows, mut cols] = self.shape;
        let mut last = cols;
        if self.flat {
            let len = rows * cols;
            cols = THREADS * self.each[0];
            rows = len.div_ceil(cols);
            last = len - rows.saturating_sub(1) * cols;
        }
        let wide = cols.div_ceil(self.each[0]);
        let across_block = wide.next_power_of_two().clamp(1, THREADS);
        let down_block = THREADS / across_block;
        let (across, down) = (wide.div_ceil(across_block), rows.div_ceil(down_block * self.each[1]));
        let argument = Argument {
            rows: rows as i64,
            cols: cols as i64,
            last: last as i64,
            across: across as i32,
            vectors: i32::from(self.vectors),
        };
        launch.value(argument).grid([across * down, 1, 1]).block([across_block, down_block, 1])
    }
}
