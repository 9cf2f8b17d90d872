//! Tensor maps: how the copy engine of Hopper (TMA) sees a matrix.

use std::ffi::c_void;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::Cuda;
use super::driver::cu;
use crate::{DType, Element, Result, View, ViewMut};

/// What a kernel takes for a `TensorMap`, by value.
pub(super) type TensorMap = [u64; 16];

/// Size of the dimension whose end is a group's end ([`Tiled::ragged`]): `RAGGED` of the kernels.
const RAGGED: u64 = 1 << 30;
/// No index along a dimension comes here.
const FAR: u64 = 0x7fff_0000;

/// Bytes that a tile has of a row, where nothing else is said.
pub(super) const ROW: u32 = 128;

/// A matrix that tiles are moved from or to. A tile has 128 bytes of columns, or 64, swizzled by as many in shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiled {
    dtype: DType,
    address: u64,
    rows: u64,
    cols: u64,
    /// Bytes between rows.
    stride: u64,
}

impl<E: Element> From<View<'_, E, Cuda>> for Tiled {
    fn from(view: View<'_, E, Cuda>) -> Self {
        let (layout, size) = (view.layout(), size_of::<E>());
        Tiled {
            dtype: E::DTYPE,
            address: view.buf().address() + (layout.offset * size) as u64,
            rows: layout.rows as u64,
            cols: layout.cols as u64,
            stride: (layout.stride * size) as u64,
        }
    }
}

impl<E: Element> From<&ViewMut<'_, E, Cuda>> for Tiled {
    fn from(view: &ViewMut<'_, E, Cuda>) -> Self {
        view.as_view().into()
    }
}

impl Tiled {
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn rows(&self) -> usize {
        self.rows as usize
    }

    pub(super) fn cols(&self) -> usize {
        self.cols as usize
    }

    /// Whether the copy engine can address it: rows at multiples of 16 bytes, and sizes within its limits.
    pub(super) fn is_addressable(&self) -> bool {
        self.address.is_multiple_of(16)
            && self.stride.is_multiple_of(16)
            && (16..1 << 34).contains(&self.stride)
            && (1..RAGGED).contains(&self.rows)
            && self.stride * self.rows < 1 << 40
            && (1..1 << 31).contains(&self.cols)
    }

    /// Its columns' first and second half.
    pub(super) fn halves(&self) -> [Tiled; 2] {
        let first = Tiled { cols: self.cols / 2, ..*self };
        [first, Tiled { address: self.address + first.cols * self.dtype.size() as u64, ..first }]
    }

    /// As it is: coordinates (column, row).
    pub(super) fn plain(&self, tile_rows: u32) -> Result<TensorMap> {
        self.encode(&[self.cols, self.rows], &[self.stride], [ROW, tile_rows])
    }

    /// As equal groups of rows, past whose ends there is nothing: coordinates (column, row, group).
    pub(super) fn groups(&self, groups: usize, tile_rows: u32) -> Result<TensorMap> {
        let rows = self.rows / groups as u64;
        self.encode(&[self.cols, rows, groups as u64], &[self.stride, self.stride * rows], [ROW, tile_rows])
    }

    /// As groups of rows whose ends only the device knows: coordinates (column, `RAGGED` − rows left, end of the group, `RAGGED`). A tile
    /// has so many bytes of so many rows.
    ///
    /// The second coordinate passes its dimension's end where the group ends. The address is that of the row all the same:
    /// `(2³⁰ − left)·s + end·s + 2³⁰·(2³⁴ − s)` is `(end − left)·s` modulo 2⁶⁴. (The form is that of Triton's ragged TMA.)
    pub(super) fn ragged(&self, tile: [u32; 2]) -> Result<TensorMap> {
        let strides = [self.stride, self.stride, (1 << 34) - self.stride];
        self.encode(&[self.cols, RAGGED, FAR, FAR], &strides, tile)
    }

    /// As heads side by side in rows that are sequence-major: coordinates (column of the head, position, head, sequence).
    pub(super) fn heads(&self, batch: usize, heads: usize, tile_rows: u32) -> Result<TensorMap> {
        let (batch, heads) = (batch as u64, heads as u64);
        let dims = [self.cols / heads, self.rows / batch, heads, batch];
        let strides = [self.stride * batch, dims[0] * self.dtype.size() as u64, self.stride];
        self.encode(&dims, &strides, [ROW, tile_rows])
    }

    fn encode(&self, dims: &[u64], strides: &[u64], [row, rows]: [u32; 2]) -> Result<TensorMap> {
        let dtype = match self.dtype {
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            other => unreachable!("no kernel moves tiles of {other}"),
        };
        let tile = [row / self.dtype.size() as u32, rows, 1, 1];
        let swizzle = match row {
            ROW => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        };
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: dimensions, strides and tile have as many entries as the rank says; the driver reads them and writes `map`.
        unsafe {
            cu!(cuTensorMapEncodeTiled(
                &mut map,
                dtype,
                dims.len() as u32,
                self.address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1u32; 4].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ))?;
        }
        Ok(map.opaque)
    }
}
