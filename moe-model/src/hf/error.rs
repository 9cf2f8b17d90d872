//! Why the weights of a folder were refused.

use std::io;
use std::path::PathBuf;

use safetensors::Dtype;

/// Why the weights of a Hugging Face folder were refused, or could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb: `read`, `write`, …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A folder without safetensors files.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json{hint}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// What it has instead.
        hint: &'static str,
    },
    /// A folder with two sets of files.
    #[error(
        "{} has both model.safetensors and model.safetensors.index.json: remove the one that is not meant",
        folder.display()
    )]
    TwoSets {
        /// The folder.
        folder: PathBuf,
    },
    /// The header of a file cannot be trusted.
    #[error("{}: the header {what}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// What the header says of a tensor cannot be.
    #[error("{}: {tensor} {what}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The hub's name of the tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file is shorter than its header says.
    #[error("{}: {tensor} is cut off: the file has {found} bytes of {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its first tensor that is not whole.
        tensor: String,
        /// Bytes that the header promises.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// The index cannot be trusted.
    #[error("{}: the index {what}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that the index names is not there.
    #[error("{} is missing: the index has {tensor} in it", path.display())]
    MissingShard {
        /// The file.
        path: PathBuf,
        /// A tensor that is in it.
        tensor: String,
    },
    /// The index names a tensor that its file does not have.
    #[error("{} has no {tensor}, which the index has in it", path.display())]
    NotInShard {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A file has a tensor that the index does not name.
    #[error("{}: {tensor} is missing in the index", path.display())]
    NotInIndex {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor is there twice.
    #[error("{tensor} is there twice, in {} and in {}", files[0].display(), files[1].display())]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// Where.
        files: [PathBuf; 2],
    },
    /// The model has no such tensor.
    #[error("{}: {tensor} is no tensor of the model that config.json describes{hint}", path.display())]
    Unmapped {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why it might be there.
        hint: &'static str,
    },
    /// A tensor of the model is not there.
    #[error("{} has no {tensor}, which is {shape:?} in the model that config.json describes", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the model's.
    #[error("{}: {tensor} is {found:?}, but {wanted:?} in the model that config.json describes", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// Its shape in the model.
        wanted: Vec<usize>,
    },
    /// A tensor of a type that is not read.
    #[error("{}: {tensor} is of type {dtype}, but weights are read from F64, F32, BF16 and F16", path.display())]
    Type {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: Dtype,
    },
    /// A block outside of its tensor.
    #[error("{tensor} is {dims:?}, and has no block of rows {rows:?} and columns {cols:?}")]
    NoBlock {
        /// The model's name of the tensor.
        tensor: String,
        /// Its shape.
        dims: [usize; 2],
        /// Rows that were wanted.
        rows: std::ops::Range<usize>,
        /// Columns that were wanted.
        cols: std::ops::Range<usize>,
    },
    /// A name that the model does not have.
    #[error("{tensor} is no tensor of the model")]
    NoTensor {
        /// The model's name of the tensor.
        tensor: String,
    },
    /// A weight that is not a number, infinite, or too large for the type in which it is wanted.
    #[error("{}: {tensor} has {value:e} at [{}, {}]{}", path.display(), at[0], at[1], refusal(*value, wanted))]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row and column; the row of a vector is 0.
        at: [usize; 2],
        /// The weight.
        value: f64,
        /// The type in which it is wanted.
        wanted: &'static str,
    },
    /// A tensor of another number of elements than was promised.
    #[error("{tensor} has {expected} elements and was given {given}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements of the tensor.
        expected: usize,
        /// Elements given.
        given: usize,
    },
    /// The model cannot be laid out.
    #[error(transparent)]
    Model(#[from] crate::Error),
}

fn refusal(value: f64, dtype: &str) -> String {
    match value.is_finite() {
        true => format!(", which is infinite in {dtype}"),
        false => ", but weights must be finite".to_owned(),
    }
}
