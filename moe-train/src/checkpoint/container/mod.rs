//! Checkpoints on disk: named matrices written in pieces by several writers, complete or absent, checked end to end.
//!
//! A checkpoint is the folder `step-N` of a run. Each writer (rank) fills one file with raw little-endian pieces of
//! logical tensors; one coordinator then writes `manifest.json`, which lists and hashes all of them, and renames the
//! folder. Nothing here knows a mapping: a [`PieceSpec`] says which elements of which logical matrix it holds, and the
//! manifest is refused unless every element is there exactly once.
//!
//! ```
//! use moe_kernels::DType;
//! use moe_train::checkpoint::container::{Checkpoint, PendingCheckpoint, PieceSpec, PieceWriter, open_newest};
//!
//! # let folder = tempfile::tempdir()?;
//! # let root = folder.path();
//! let pending = PendingCheckpoint::create(root, 100)?;
//! // Each rank writes what it holds: here two of them one row each of a 2×3 matrix.
//! let mut files = Vec::new();
//! for rank in 0..2 {
//!     let mut writer = PieceWriter::create(pending.folder(), rank)?;
//!     let spec = PieceSpec {
//!         tensor: "w".into(),
//!         kind: "param".into(),
//!         dtype: DType::F32,
//!         dims: [2, 3],
//!         rows: rank..rank + 1,
//!         cols: 0..3,
//!         part: 0..3,
//!     };
//!     writer.write(spec, &[rank as u8; 12])?;
//!     files.push(writer.finish()?);
//! }
//! // The coordinator completes it.
//! pending.commit(files, serde_json::json!({"step": 100}))?;
//!
//! let checkpoint = open_newest(root, &mut |damaged| eprintln!("{damaged}"))?;
//! assert_eq!(checkpoint.step(), 100);
//! assert_eq!(checkpoint.read_tensor("w", "param")?[12..], [1; 12]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod coverage;
mod error;
mod folder;
mod manifest;
mod piece;
mod read;
mod write;

pub use error::CheckpointError;
pub use folder::{Listed, list, open_newest, prune, set_aside, step_folder};
pub use piece::{Piece, PieceFile, PieceSpec};
pub use read::{Checkpoint, TensorInfo};
pub use write::{PendingCheckpoint, PieceWriter};

#[cfg(test)]
mod tests;
