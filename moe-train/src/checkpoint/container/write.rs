//! Writing a checkpoint.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::folder::{LATEST, remove_leftovers, step_folder};
use super::manifest::{MANIFEST, Manifest};
use super::{CheckpointError, Piece, PieceFile, PieceSpec, coverage};
use crate::durable::{Context, create_new, rename, replace, sync_folder, temporary_name, write_new};

/// A checkpoint that is being written: the coordinator's part. It becomes a checkpoint in [`commit`](Self::commit);
/// dropped before, it leaves nothing.
#[derive(Debug)]
pub struct PendingCheckpoint {
    root: PathBuf,
    step: u64,
    folder: PathBuf,
    committed: bool,
}

impl PendingCheckpoint {
    /// Makes the folder `root/step-N.tmp-XXXX` and removes those that crashed runs left. One run at a time writes to
    /// `root`.
    ///
    /// # Errors
    /// There is a checkpoint of this step already, or the folder cannot be made.
    pub fn create(root: &Path, step: u64) -> Result<Self, CheckpointError> {
        fs::create_dir_all(root).context("create", root)?;
        remove_leftovers(root)?;
        refuse_existing(root, step)?;
        let folder = temporary_name(&step_folder(root, step));
        fs::create_dir(&folder).context("create", &folder)?;
        Ok(PendingCheckpoint { root: root.to_owned(), step, folder, committed: false })
    }

    /// Where writers put their files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Completes the checkpoint from what all writers returned and gives its folder; `meta` is the run's own. The
    /// manifest comes last, then the folder gets its name, then the hint `LATEST` changes.
    ///
    /// # Errors
    /// An element of a tensor is missing or there twice, there is a checkpoint of this step already, or something cannot
    /// be written.
    pub fn commit(mut self, files: Vec<PieceFile>, meta: Value) -> Result<PathBuf, CheckpointError> {
        let path = step_folder(&self.root, self.step);
        coverage::index(&files, &path)?;
        let manifest = Manifest::new(self.step, meta, files).to_bytes().map_err(|error| {
            CheckpointError::Manifest { path: path.clone(), what: format!("cannot be made: {error}") }
        })?;
        write_new(&self.folder.join(MANIFEST), &manifest)?;
        sync_folder(&self.folder)?;
        refuse_existing(&self.root, self.step)?;
        rename(&self.folder, &path)?;
        self.committed = true;
        replace(&self.root.join(LATEST), format!("step-{}\n", self.step).as_bytes())?;
        Ok(path)
    }
}

impl Drop for PendingCheckpoint {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is removed by the next save.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// `rename` would replace an empty folder.
fn refuse_existing(root: &Path, step: u64) -> Result<(), CheckpointError> {
    let path = step_folder(root, step);
    match path.try_exists().context("read", &path)? {
        true => Err(CheckpointError::Exists { path }),
        false => Ok(()),
    }
}

/// One writer's file.
#[derive(Debug)]
pub struct PieceWriter {
    path: PathBuf,
    file: BufWriter<File>,
    written: PieceFile,
}

impl PieceWriter {
    /// The file of writer number `writer` in the folder of a [`PendingCheckpoint`].
    ///
    /// # Errors
    /// The file exists already or cannot be made.
    pub fn create(folder: &Path, writer: usize) -> Result<Self, CheckpointError> {
        let name = format!("rank-{writer:05}.bin");
        let path = folder.join(&name);
        let file = BufWriter::with_capacity(1 << 20, create_new(&path)?);
        Ok(PieceWriter { path, file, written: PieceFile { name, pieces: Vec::new() } })
    }

    /// Adds a piece, little-endian.
    ///
    /// # Errors
    /// The piece is empty or outside of its matrix, the data has another length, or it cannot be written.
    pub fn write(&mut self, spec: PieceSpec, data: &[u8]) -> Result<(), CheckpointError> {
        if spec.bytes() != Some(data.len()) {
            return Err(CheckpointError::Piece { spec: Box::new(spec), bytes: data.len() });
        }
        self.file.write_all(data).context("write", &self.path)?;
        self.written.pieces.push(Piece {
            spec,
            offset: self.written.bytes(),
            bytes: data.len() as u64,
            blake3: blake3::hash(data).to_hex().to_string(),
        });
        Ok(())
    }

    /// Makes the file durable and says what is in it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<PieceFile, CheckpointError> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).context("write", &self.path)?;
        Ok(self.written)
    }
}
