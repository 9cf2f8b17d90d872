//! Tensor maps: how the copy engine of Hopper (TMA) sees a matrix.

use std::ffi::c_void;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::Cuda;
use super::driver::cu;
use crate::{DType, Element, Result, View};

/// What a kernel takes for a `TensorMap`, by value.
pub(super) type TensorMap = [u64; 16];

/// A matrix that tiles are moved from or to. A tile has 128 bytes of columns, swizzled in shared memory.
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

impl Tiled {
    /// Whether the copy engine can address it: rows at multiples of 16 bytes, and sizes within its limits.
    pub(super) fn is_addressable(&self) -> bool {
        self.address.is_multiple_of(16)
            && self.stride.is_multiple_of(16)
            && (16..1 << 34).contains(&self.stride)
            && (1..1 << 30).contains(&self.rows)
            && self.stride * self.rows < 1 << 40
            && self.cols < 1 << 31
    }

    /// As heads side by side in rows that are sequence-major: coordinates (column of the head, position, head, sequence).
    pub(super) fn heads(&self, batch: usize, heads: usize, tile_rows: u32) -> Result<TensorMap> {
        let (batch, heads) = (batch as u64, heads as u64);
        let dims = [self.cols / heads, self.rows / batch, heads, batch];
        let strides = [self.stride * batch, dims[0] * self.dtype.size() as u64, self.stride];
        self.encode(&dims, &strides, tile_rows)
    }

    fn encode(&self, dims: &[u64], strides: &[u64], tile_rows: u32) -> Result<TensorMap> {
        let dtype = match self.dtype {
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            other => unreachable!("no kernel moves tiles of {other}"),
        };
        let tile = [128 / self.dtype.size() as u32, tile_rows, 1, 1];
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
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            ))?;
        }
        Ok(map.opaque)
    }
}
