//! Which elements of which logical matrix a run of bytes holds.

use std::ops::Range;

use moe_kernels::DType;
use serde::{Deserialize, Serialize};

/// Elements of a logical matrix `dims`: its block `rows × cols`, flattened row by row, and of that the elements `part`.
/// All blocks of a tensor are the same or disjoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceSpec {
    /// Name of the tensor.
    pub tensor: String,
    /// What is kept of it: `param`, `m`, `v`.
    pub kind: String,
    /// Type of its elements.
    #[serde(with = "dtype_name")]
    pub dtype: DType,
    /// Logical shape, `[rows, cols]`.
    pub dims: [usize; 2],
    /// Rows of the block.
    pub rows: Range<usize>,
    /// Columns of the block.
    pub cols: Range<usize>,
    /// Elements of the flattened block.
    pub part: Range<usize>,
}

impl PieceSpec {
    /// Elements of the block; none if it is outside of the matrix or cannot be counted.
    pub(super) fn block_len(&self) -> Option<usize> {
        let inside = |range: &Range<usize>, len| range.start < range.end && range.end <= len;
        let inside = inside(&self.rows, self.dims[0]) && inside(&self.cols, self.dims[1]);
        self.dims[0].checked_mul(self.dims[1]).filter(|_| inside)?;
        Some(self.rows.len() * self.cols.len())
    }

    /// Bytes of the piece; none if it is empty or outside of the block.
    pub(super) fn bytes(&self) -> Option<usize> {
        let block = self.block_len()?;
        let inside = self.part.start < self.part.end && self.part.end <= block;
        self.part.len().checked_mul(self.dtype.size()).filter(|_| inside)
    }

    /// The piece as runs of elements in one row each: row, columns, and where the run starts in the piece.
    pub(super) fn runs(&self) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
        let width = self.cols.len();
        let first = self.part.start / width;
        let last = (self.part.end - 1) / width;
        (first..=last).map(move |row| {
            let start = self.part.start.max(row * width);
            let end = self.part.end.min((row + 1) * width);
            let column = |at: usize| self.cols.start + at - row * width;
            (self.rows.start + row, column(start)..column(end), start - self.part.start)
        })
    }
}

/// A piece in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// What it holds.
    #[serde(flatten)]
    pub spec: PieceSpec,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its bytes, in hexadecimal.
    pub blake3: String,
}

/// What one writer wrote: sent to the coordinator, which lists it in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceFile {
    /// The file's name in the checkpoint's folder.
    pub name: String,
    /// Its pieces, one after the other without gaps.
    pub pieces: Vec<Piece>,
}

impl PieceFile {
    /// Length of the file.
    pub fn bytes(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.offset + piece.bytes)
    }
}

mod dtype_name {
    use moe_kernels::DType;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(dtype.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        let name = String::deserialize(deserializer)?;
        [DType::F64, DType::F32, DType::Bf16, DType::I64, DType::I32, DType::U8]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| D::Error::custom(format!("unknown element type \"{name}\"")))
    }
}
