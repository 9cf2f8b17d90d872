//! Reading a checkpoint.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_kernels::DType;
use serde_json::Value;

use super::coverage::{self, Index};
use super::folder::step_of;
use super::manifest::{MANIFEST, Manifest};
use super::{CheckpointError, Piece, PieceFile};
use crate::durable::Context;

/// A checkpoint whose manifest is intact, whose files are there in full length, and whose tensors are whole. What is read
/// from it is checked as it is read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    index: Index,
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// What is kept of it.
    pub kind: &'a str,
    /// Type of its elements.
    pub dtype: DType,
    /// Logical shape, `[rows, cols]`.
    pub dims: [usize; 2],
}

impl Checkpoint {
    /// Opens the folder of one checkpoint.
    ///
    /// # Errors
    /// The manifest is missing or damaged, belongs to another step than the folder's name says, or does not match the
    /// files.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let manifest_path = path.join(MANIFEST);
        let bytes = fs::read(&manifest_path).context("read", &manifest_path)?;
        let manifest = Manifest::from_bytes(&bytes, path)?;
        if let Some(named) = step_of(path).filter(|&named| named != manifest.step) {
            let what = format!("is of step {}, but the folder is named step-{named}", manifest.step);
            return Err(CheckpointError::Manifest { path: path.to_owned(), what });
        }
        for file in &manifest.files {
            check_file(path, file)?;
        }
        let index = coverage::index(&manifest.files, path)?;
        Ok(Checkpoint { path: path.to_owned(), manifest, index })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The step after which it was written.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What the run stored besides tensors.
    pub fn meta(&self) -> &Value {
        &self.manifest.meta
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.manifest.files.iter().map(PieceFile::bytes).sum()
    }

    /// The number of files that tensors are in: of ranks that wrote.
    pub fn writers(&self) -> usize {
        self.manifest.files.len()
    }

    /// All tensors, by name and kind.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.index.iter().filter_map(|((name, kind), pieces)| {
            let (_, Piece { spec, .. }) = pieces.first()?;
            Some(TensorInfo { name, kind, dtype: spec.dtype, dims: spec.dims })
        })
    }

    /// One tensor's type and shape.
    ///
    /// # Errors
    /// There is none of that name and kind.
    pub fn tensor(&self, name: &str, kind: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        let key = (name.to_owned(), kind.to_owned());
        let found = self.index.get_key_value(&key).and_then(|((name, kind), pieces)| {
            let (_, Piece { spec, .. }) = pieces.first()?;
            Some(TensorInfo { name, kind, dtype: spec.dtype, dims: spec.dims })
        });
        let (path, (tensor, kind)) = (self.path.clone(), key.clone());
        found.ok_or(CheckpointError::NoTensor { path, tensor, kind })
    }

    /// A whole tensor, row by row, little-endian.
    ///
    /// # Errors
    /// There is none, or a byte of it changed since it was written.
    pub fn read_tensor(&self, name: &str, kind: &str) -> Result<Vec<u8>, CheckpointError> {
        let [rows, cols] = self.tensor(name, kind)?.dims;
        self.read_block(name, kind, 0..rows, 0..cols)
    }

    /// A block of a tensor, row by row, little-endian. Only pieces that meet it are read.
    ///
    /// # Errors
    /// There is no such tensor or block, or a byte of what was read changed since it was written.
    pub fn read_block(
        &self,
        name: &str,
        kind: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<u8>, CheckpointError> {
        let bytes = self.block_bytes(name, kind, &rows, &cols)?;
        let mut block = vec![0; bytes];
        self.read_block_into(name, kind, rows, cols, &mut block)?;
        Ok(block)
    }

    /// As [`read_block`](Self::read_block), into memory of exactly its size.
    ///
    /// # Errors
    /// Also [`CheckpointError::BlockLength`].
    pub fn read_block_into(
        &self,
        name: &str,
        kind: &str,
        rows: Range<usize>,
        cols: Range<usize>,
        block: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let expected = self.block_bytes(name, kind, &rows, &cols)?;
        if block.len() != expected {
            let (tensor, given) = (name.to_owned(), block.len());
            return Err(CheckpointError::BlockLength { tensor, expected, given });
        }
        let pieces = self.index.get(&(name.to_owned(), kind.to_owned()));
        for (file, piece) in pieces.into_iter().flatten() {
            let size = piece.spec.dtype.size();
            let mut data = None;
            for (row, run, at) in piece.spec.runs() {
                let shared = run.start.max(cols.start)..run.end.min(cols.end);
                if !rows.contains(&row) || shared.is_empty() {
                    continue;
                }
                let data = match &data {
                    Some(data) => data,
                    None => data.insert(self.read_piece(&self.manifest.files[*file], piece)?),
                };
                let from = (at + shared.start - run.start) * size;
                let to = ((row - rows.start) * cols.len() + shared.start - cols.start) * size;
                let bytes = shared.len() * size;
                block[to..to + bytes].copy_from_slice(&data[from..from + bytes]);
            }
        }
        Ok(())
    }

    /// Bytes of a block.
    fn block_bytes(
        &self,
        name: &str,
        kind: &str,
        rows: &Range<usize>,
        cols: &Range<usize>,
    ) -> Result<usize, CheckpointError> {
        let TensorInfo { dtype, dims, .. } = self.tensor(name, kind)?;
        let inside = |range: &Range<usize>, len| range.start <= range.end && range.end <= len;
        match inside(rows, dims[0]) && inside(cols, dims[1]) {
            true => Ok(rows.len() * cols.len() * dtype.size()),
            false => {
                let (tensor, rows, cols) = (name.to_owned(), rows.clone(), cols.clone());
                Err(CheckpointError::NoBlock { tensor, dims, rows, cols })
            }
        }
    }

    /// Reads every byte and says all that is wrong: damaged pieces, and files that the manifest does not list (hidden
    /// ones aside).
    pub fn verify(&self) -> Vec<CheckpointError> {
        let mut faults = Vec::new();
        for file in &self.manifest.files {
            faults.extend(file.pieces.iter().filter_map(|piece| self.read_piece(file, piece).err()));
        }
        match self.unlisted() {
            Ok(unlisted) => faults.extend(unlisted),
            Err(error) => faults.push(error),
        }
        faults
    }

    fn unlisted(&self) -> Result<Vec<CheckpointError>, CheckpointError> {
        let listed: BTreeSet<&str> = self.manifest.files.iter().map(|file| file.name.as_str()).collect();
        let mut unlisted = Vec::new();
        for entry in fs::read_dir(&self.path).context("read", &self.path)? {
            let file = entry.context("read", &self.path)?.file_name().to_string_lossy().into_owned();
            if file != MANIFEST && !file.starts_with('.') && !listed.contains(file.as_str()) {
                unlisted.push(CheckpointError::Unlisted { path: self.path.clone(), file });
            }
        }
        Ok(unlisted)
    }

    fn read_piece(&self, file: &PieceFile, piece: &Piece) -> Result<Vec<u8>, CheckpointError> {
        let path = self.path.join(&file.name);
        let read = || {
            let mut reader = File::open(&path)?;
            reader.seek(SeekFrom::Start(piece.offset))?;
            // Not more than the file had when it was opened.
            let mut data = Vec::with_capacity(piece.bytes as usize);
            reader.take(piece.bytes).read_to_end(&mut data)?;
            Ok(data)
        };
        let data = read().context("read", &path)?;
        // Also where the file was cut off since it was opened: the hash covers the length.
        match blake3::hash(&data).to_hex().as_str() == piece.blake3 {
            true => Ok(data),
            false => Err(CheckpointError::Checksum {
                path: self.path.clone(),
                file: file.name.clone(),
                tensor: piece.spec.tensor.clone(),
                kind: piece.spec.kind.clone(),
                offset: piece.offset,
            }),
        }
    }
}

/// A file is there in full length, and its pieces fill it without gaps.
fn check_file(folder: &Path, file: &PieceFile) -> Result<(), CheckpointError> {
    let mut end = 0;
    for piece in &file.pieces {
        let next = piece.offset.checked_add(piece.bytes).filter(|_| piece.offset == end);
        end = next.ok_or_else(|| CheckpointError::Manifest {
            path: folder.to_owned(),
            what: format!("lists pieces of {} that are not one after the other", file.name),
        })?;
    }
    let path = folder.join(&file.name);
    let found = fs::metadata(&path).context("read", &path)?.len();
    if found == end {
        return Ok(());
    }
    let cut = file.pieces.iter().find(|piece| piece.offset + piece.bytes > found);
    Err(CheckpointError::Length {
        path: folder.to_owned(),
        file: file.name.clone(),
        tensor: cut.map(|piece| piece.spec.tensor.clone()),
        expected: end,
        found,
    })
}
