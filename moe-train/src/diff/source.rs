//! Where tensors that are compared come from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use moe_kernels::DType;
use moe_model::hf::{StoredTensor, TensorFile, WeightsError, is_hub_folder, tensor_files};
use safetensors::Dtype;

use super::DiffError;
use crate::Result;
use crate::checkpoint::container::Checkpoint;
use crate::optim::Moment;
use crate::run::open_checkpoint;

/// Named tensors: those of a safetensors file, of a folder of the hub, or of a checkpoint.
///
/// A checkpoint's weights have their names in it; other kinds of state are called `NAME (KIND)`.
#[derive(Debug)]
pub struct Tensors {
    path: PathBuf,
    kinds: BTreeMap<String, TensorKind>,
    source: Source,
}

/// A tensor's type and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorKind {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

#[derive(Debug)]
enum Source {
    /// Each tensor's file, and where it starts there and how many bytes it has.
    Files(BTreeMap<String, (PathBuf, u64, u64)>),
    /// Each tensor's name and kind.
    Checkpoint(Checkpoint, BTreeMap<String, (String, String)>),
}

impl Tensors {
    /// Opens a file, or the folder of a model of the hub, of a checkpoint or of a run (its newest checkpoint).
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self::of_files(path, vec![TensorFile::open(path).map_err(DiffError::File)?]));
        }
        if is_hub_folder(path) {
            return Ok(Self::of_files(path, tensor_files(path).map_err(DiffError::File)?));
        }
        match path.is_dir() {
            true => Self::of_checkpoint(open_checkpoint(path)?),
            false => Err(DiffError::Nothing { path: path.to_owned() }.into()),
        }
    }

    fn of_files(path: &Path, files: Vec<TensorFile>) -> Self {
        let (mut kinds, mut places) = (BTreeMap::new(), BTreeMap::new());
        for TensorFile { path, tensors } in files {
            for StoredTensor { name, dtype, shape, offset, bytes } in tensors {
                kinds.insert(name.clone(), TensorKind { dtype, shape });
                places.insert(name, (path.clone(), offset, bytes));
            }
        }
        Tensors { path: path.to_owned(), kinds, source: Source::Files(places) }
    }

    /// Those of a checkpoint.
    ///
    /// # Errors
    /// It has tensors of a type that is not compared.
    pub fn of_checkpoint(checkpoint: Checkpoint) -> Result<Self> {
        let (mut kinds, mut names) = (BTreeMap::new(), BTreeMap::new());
        for tensor in checkpoint.tensors() {
            let name = match tensor.kind == Moment::Master.name() {
                true => tensor.name.to_owned(),
                false => format!("{} ({})", tensor.name, tensor.kind),
            };
            let dtype = stored(tensor.dtype).ok_or_else(|| DiffError::Type {
                path: checkpoint.path().to_owned(),
                name: name.clone(),
                dtype: tensor.dtype.name(),
            })?;
            kinds.insert(name.clone(), TensorKind { dtype, shape: tensor.dims.to_vec() });
            names.insert(name, (tensor.name.to_owned(), tensor.kind.to_owned()));
        }
        let path = checkpoint.path().to_owned();
        Ok(Tensors { path, kinds, source: Source::Checkpoint(checkpoint, names) })
    }

    /// The names, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.kinds.keys().map(String::as_str)
    }

    /// Type and shape of a tensor.
    pub fn kind(&self, name: &str) -> Option<&TensorKind> {
        self.kinds.get(name)
    }

    /// Reads a tensor from its start.
    pub(super) fn read(&self, name: &str) -> Result<Reader> {
        let missing = || DiffError::NoTensor { path: self.path.clone(), name: name.to_owned() };
        match &self.source {
            Source::Files(places) => {
                let (path, offset, bytes) = places.get(name).ok_or_else(missing)?;
                let io =
                    |source| DiffError::File(WeightsError::Io { action: "read", path: path.clone(), source });
                let mut file = File::open(path).map_err(io)?;
                file.seek(SeekFrom::Start(*offset)).map_err(io)?;
                Ok(Reader::File { path: path.clone(), file, left: *bytes })
            }
            Source::Checkpoint(checkpoint, names) => {
                let (name, kind) = names.get(name).ok_or_else(missing)?;
                Ok(Reader::Bytes { bytes: checkpoint.read_tensor(name, kind)?, at: 0 })
            }
        }
    }
}

/// A tensor's bytes, block by block.
#[derive(Debug)]
pub(super) enum Reader {
    File { path: PathBuf, file: File, left: u64 },
    Bytes { bytes: Vec<u8>, at: usize },
}

impl Reader {
    /// The next bytes in place of those in `block`, as many as `len` but at the end; none when there are no more.
    pub(super) fn next_block(&mut self, len: usize, block: &mut Vec<u8>) -> Result<()> {
        block.clear();
        match self {
            Reader::File { path, file, left } => {
                let len = (len as u64).min(*left);
                block.resize(len as usize, 0);
                file.read_exact(block).map_err(|source| {
                    DiffError::File(WeightsError::Io { action: "read", path: path.clone(), source })
                })?;
                *left -= len;
            }
            Reader::Bytes { bytes, at } => {
                let end = (*at + len).min(bytes.len());
                block.extend_from_slice(&bytes[*at..end]);
                *at = end;
            }
        }
        Ok(())
    }
}

/// A checkpoint's type, as a safetensors file names it, if that is known.
fn stored(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
        _ => return None,
    })
}
