//! What a thread moves at once: vectors of 16 bytes.

use super::Cuda;
use crate::{Element, View};

/// Bytes of a vector.
const BYTES: usize = 16;

/// Elements of a vector: `N` of the kernels.
pub(super) const fn vector<E>() -> usize {
    BYTES / size_of::<E>()
}

/// Whether `each` elements of a row, from every `each`th column on, can be moved at once.
pub(super) fn vectors<E: Element>(view: View<'_, E, Cuda>, each: usize) -> bool {
    let (layout, bytes) = (view.layout(), (each * size_of::<E>()).min(BYTES));
    let start = view.buf().address() as usize + layout.offset * size_of::<E>();
    let even_rows = layout.rows <= 1 || (layout.stride * size_of::<E>()).is_multiple_of(bytes);
    start.is_multiple_of(bytes) && even_rows
}

/// Whether every row is whole vectors that can be moved at once.
pub(super) fn in_vectors<E: Element>(view: View<'_, E, Cuda>) -> bool {
    view.layout().cols.is_multiple_of(vector::<E>()) && vectors(view, vector::<E>())
}
