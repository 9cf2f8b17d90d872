//! What is wrong with a checkpoint.

use std::path::PathBuf;

use moe_kernels::DType;

use super::PieceSpec;
use crate::durable::IoError;

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is a checkpoint of this step already.
    #[error("{} exists already and is not overwritten", path.display())]
    Exists {
        /// Its folder.
        path: PathBuf,
    },
    /// A piece does not fit its matrix, or its data does not fit the piece.
    #[error("{bytes} bytes for a piece that does not hold them: {spec:?}")]
    Piece {
        /// The piece.
        spec: Box<PieceSpec>,
        /// The data's length.
        bytes: usize,
    },
    /// The pieces of a tensor do not make up the whole of it.
    #[error("checkpoint {}: {kind} of {tensor}: {what}", path.display())]
    Coverage {
        /// The checkpoint.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is kept of it.
        kind: String,
        /// What is missing, or there twice.
        what: String,
    },
    /// The manifest cannot be trusted.
    #[error("checkpoint {}: manifest.json {what}", path.display())]
    Manifest {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file is not as long as the manifest says.
    #[error(
        "checkpoint {}: {file} has {found} bytes, but {expected} were written{}",
        path.display(),
        tensor.as_ref().map(|t| format!(": {t} is cut off")).unwrap_or_default()
    )]
    Length {
        /// The checkpoint.
        path: PathBuf,
        /// The file in it.
        file: String,
        /// Its first tensor that is not whole.
        tensor: Option<String>,
        /// Bytes that were written.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A piece is not what was written.
    #[error("checkpoint {}: {kind} of {tensor} is damaged in {file} at byte {offset}: its checksum is wrong", path.display())]
    Checksum {
        /// The checkpoint.
        path: PathBuf,
        /// The file in it.
        file: String,
        /// Name of the tensor.
        tensor: String,
        /// What is kept of it.
        kind: String,
        /// Where the piece starts.
        offset: u64,
    },
    /// A file does not belong to the checkpoint.
    #[error("checkpoint {}: {file} is not in its manifest", path.display())]
    Unlisted {
        /// The checkpoint.
        path: PathBuf,
        /// The file.
        file: String,
    },
    /// A tensor was asked for that is not there.
    #[error("checkpoint {} has no {kind} of {tensor}", path.display())]
    NoTensor {
        /// The checkpoint.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What was wanted of it.
        kind: String,
    },
    /// A block was asked for that is outside of its matrix.
    #[error("{tensor} is {dims:?}, and has no block of rows {rows:?} and columns {cols:?}")]
    NoBlock {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        dims: [usize; 2],
        /// Rows that were wanted.
        rows: std::ops::Range<usize>,
        /// Columns that were wanted.
        cols: std::ops::Range<usize>,
    },
    /// A block was to be read into memory of another size.
    #[error("a block of {expected} bytes of {tensor} was to be read into {given}")]
    BlockLength {
        /// Name of the tensor.
        tensor: String,
        /// Bytes of the block.
        expected: usize,
        /// Bytes that were given.
        given: usize,
    },
    /// It was written by another model.
    #[error("checkpoint {} is of another model: {key} is {written} there and {wanted} here", path.display())]
    OtherModel {
        /// The checkpoint.
        path: PathBuf,
        /// The first key of the configuration that differs.
        key: String,
        /// Its value in the checkpoint.
        written: String,
        /// Its value in this run.
        wanted: String,
    },
    /// A tensor has another shape or type than this run's.
    #[error("checkpoint {}: {tensor} is {written} there and {wanted} in this run", path.display())]
    OtherTensor {
        /// The checkpoint.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape and type in the checkpoint.
        written: String,
        /// Shape and type in this run.
        wanted: String,
    },
    /// A checkpoint holds weights alone.
    #[error(
        "checkpoint {} is of no training run: it has weights, but no optimizer state, configuration or place in the data. \
         A new run starts from it with train.init_checkpoint",
        path.display()
    )]
    NoRun {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A weight is too large for the type in which it is wanted.
    #[error("checkpoint {}: {tensor} has the element {value:e}, which is infinite in {wanted}", path.display())]
    Overflow {
        /// The checkpoint.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// The element.
        value: f64,
        /// The type.
        wanted: DType,
    },
    /// A run has no checkpoint.
    #[error("{} has no checkpoint (no folder step-N)", root.display())]
    None {
        /// The folder of its checkpoints.
        root: PathBuf,
    },
    /// A run has no checkpoint that is whole.
    #[error("none of the {tried} checkpoints in {} is whole", root.display())]
    NoneValid {
        /// The folder of its checkpoints.
        root: PathBuf,
        /// How many there are.
        tried: usize,
    },
}
