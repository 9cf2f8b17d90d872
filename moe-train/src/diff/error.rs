//! Why tensors cannot be compared.

use std::path::PathBuf;

use moe_model::hf::WeightsError;

/// Why tensors cannot be compared, or that they differ.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// A safetensors file is wrong.
    #[error(transparent)]
    File(#[from] WeightsError),
    /// There is nothing at a path.
    #[error("there is no {}", path.display())]
    Nothing {
        /// The path.
        path: PathBuf,
    },
    /// A tensor that a set does not have was asked for.
    #[error("{} has no tensor {name}", path.display())]
    NoTensor {
        /// The set.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A tensor is of a type that is not compared.
    #[error("{}: {name} is {dtype}, which is not compared", path.display())]
    Type {
        /// The set.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        dtype: &'static str,
    },
    /// Tensors differ.
    #[error("{differing} of {all} tensors differ")]
    Differ {
        /// Tensors that differ by more than the tolerance, or that one side lacks.
        differing: usize,
        /// All that either side has.
        all: usize,
    },
}
