//! A folder of the hub into a checkpoint of weights alone.

use std::path::{Path, PathBuf};

use moe_kernels::Float;
use moe_model::params::ParamLayout;

use super::container::{CheckpointError, PendingCheckpoint, PieceFile, PieceSpec, PieceWriter};
use super::hub::copy_side_files;
use super::state::BUFFER;
use super::{Meta, Weights};
use crate::Result;
use crate::optim::Moment;
use crate::run::SIDE_FILES;

/// Elements of a piece, at most, unless a row has more: what is in memory at a time. Ranks read the pieces that meet their
/// blocks, and no others.
const PIECE: usize = 1 << 20;

/// Writes the checkpoint `root/step-0` of `weights` in `A`, and beside it the folder `hub` of what else belongs to the
/// model; returns the checkpoint's folder. It is of no run.
///
/// # Errors
/// There is a checkpoint at `root/step-0` already; weights cannot be read, or an element is infinite in `A`; something
/// cannot be written. There is no checkpoint then.
pub fn import<A: Float<Acc = A>>(weights: &Weights, root: &Path) -> Result<PathBuf> {
    let pending = PendingCheckpoint::create(root, 0)?;
    let file = write::<A>(weights, pending.folder())?;
    if let Some(side_files) = weights.side_files() {
        copy_side_files(&side_files, &root.join(SIDE_FILES))?;
    }
    let meta = Meta { run: None, ..weights.meta().clone() };
    let meta = serde_json::to_value(meta).map_err(|error| CheckpointError::Manifest {
        path: root.to_owned(),
        what: format!("cannot hold the model: {error}"),
    })?;
    Ok(pending.commit(vec![file], meta)?)
}

/// All tensors, piece by piece.
fn write<A: Float>(weights: &Weights, folder: &Path) -> Result<PieceFile> {
    let layout = ParamLayout::of_model(weights.model())?;
    let mut writer = PieceWriter::create(folder, 0)?;
    for part in layout.buckets().iter().flat_map(|bucket| &bucket.parts) {
        let [rows, cols] = part.dims;
        let at_a_time = (PIECE / cols.max(1)).max(1);
        for first in (0..rows).step_by(at_a_time) {
            let own = first..rows.min(first + at_a_time);
            let block = weights.read::<A>(&part.name, part.dims, own.clone(), 0..cols)?;
            let spec = PieceSpec {
                part: own.start * cols..own.end * cols,
                ..whole::<A>(&part.name, Moment::Master.name(), part.dims)
            };
            writer.write(spec, bytemuck::cast_slice(&block))?;
        }
    }
    for (_, buffer) in layout.buffers() {
        let values = weights.read_buffer::<A>(&buffer.name, buffer.len)?;
        writer.write(whole::<A>(&buffer.name, BUFFER, [1, buffer.len]), bytemuck::cast_slice(&values))?;
    }
    Ok(writer.finish()?)
}

fn whole<A: Float>(tensor: &str, kind: &str, dims: [usize; 2]) -> PieceSpec {
    let [rows, cols] = dims;
    let (tensor, kind) = (tensor.to_owned(), kind.to_owned());
    PieceSpec { tensor, kind, dtype: A::DTYPE, dims, rows: 0..rows, cols: 0..cols, part: 0..rows * cols }
}
