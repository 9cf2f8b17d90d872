//! Tables on the device: what a launch is told of more operands than it has arguments.

use super::device::{Cuda, CudaBuf};
use super::vectors::vectors;
use crate::{Device, Element, Result, View};

/// Where a `[1, n]` matrix begins, and whether its elements may be moved as vectors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub(super) address: u64,
    pub(super) vectors: bool,
}

impl Cuda {
    /// Of an operand on this device, moved `each` elements at once.
    pub(super) fn start<E: Element>(&self, view: View<'_, E, Cuda>, each: usize) -> Result<Start> {
        self.require(view.buf())?;
        let address = view.buf().address() + (view.layout().offset * size_of::<E>()) as u64;
        Ok(Start { address, vectors: vectors(view, each) })
    }

    /// A copy of a table on the device, of rows of words as a kernel's `struct` has them. Like scratch memory it may be dropped
    /// after the launch.
    pub(super) fn table<const WORDS: usize>(&self, rows: &[[u64; WORDS]]) -> Result<CudaBuf> {
        let bytes: &[u8] = bytemuck::cast_slice(rows.as_flattened());
        let mut table = self.alloc(bytes.len())?;
        self.upload(&mut table, 0, bytes)?;
        Ok(table)
    }
}
