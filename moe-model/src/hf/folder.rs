//! The weights of a folder, read block by block.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use moe_kernels::Float;

use super::header::TensorFile;
use super::index::ShardIndex;
use super::names::{HubName, HubNames, HubTensor};
use super::{FloatType, WeightsError};

/// The one file of a folder that is not sharded.
pub(super) const SINGLE: &str = "model.safetensors";

/// The index of one that is.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Bytes that are decoded at a time.
const CHUNK: usize = 1 << 16;

/// The safetensors files of a folder, which have every tensor of a model once, in its shape, and nothing else. Only headers
/// are read to know that; what is read later is positioned reads of what is wanted.
#[derive(Debug)]
pub struct HubFolder {
    path: PathBuf,
    names: HubNames,
    files: Vec<PathBuf>,
    places: BTreeMap<String, Place>,
    skipped: Vec<String>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    dtype: FloatType,
    offset: u64,
}

impl HubFolder {
    /// Opens the files of `path`, whose tensors are to be those of `names`.
    ///
    /// # Errors
    /// A file or the index is missing, malformed or cut off; a tensor is missing, there twice, unknown, or of another
    /// shape or a type that is not read; index and files disagree.
    pub fn open(path: &Path, names: HubNames) -> Result<Self, WeightsError> {
        let opened = tensor_files(path)?;
        let mut files = Vec::with_capacity(opened.len());
        let mut places: BTreeMap<String, Place> = BTreeMap::new();
        let mut next_token = BTreeMap::<usize, usize>::new();
        for (number, TensorFile { path: file, tensors }) in opened.into_iter().enumerate() {
            for stored in tensors {
                let tensor = match names.find(&stored.name) {
                    HubName::Tensor(tensor) => tensor,
                    HubName::Computed => continue,
                    HubName::NextTokenLayer(layer) => {
                        *next_token.entry(layer).or_default() += 1;
                        continue;
                    }
                    HubName::Unknown(hint) => {
                        return Err(WeightsError::Unmapped { path: file, tensor: stored.name, hint });
                    }
                };
                if stored.shape != tensor.shape {
                    let (tensor, found, wanted) = (stored.name, stored.shape, tensor.shape.clone());
                    return Err(WeightsError::Shape { path: file, tensor, found, wanted });
                }
                let Some(dtype) = FloatType::of(stored.dtype) else {
                    let (tensor, dtype) = (stored.name, stored.dtype);
                    return Err(WeightsError::Type { path: file, tensor, dtype });
                };
                let place = Place { file: number, dtype, offset: stored.offset };
                places.insert(tensor.name.clone(), place);
            }
            files.push(file);
        }
        if let Some(missing) = names.tensors().iter().find(|tensor| !places.contains_key(&tensor.name)) {
            let (tensor, shape) = (missing.hub.clone(), missing.shape.clone());
            return Err(WeightsError::Missing { folder: path.to_owned(), tensor, shape });
        }
        let skipped = next_token.into_iter().map(|(layer, tensors)| {
            format!(
                "{}: the {tensors} tensors of layer {layer}, which predicts further tokens (num_nextn_predict_layers), are \
                 skipped, as transformers does",
                path.display()
            )
        });
        Ok(HubFolder { path: path.to_owned(), names, files, places, skipped: skipped.collect() })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors.
    pub fn names(&self) -> &HubNames {
        &self.names
    }

    /// What of the files is not read although it is weights, in words for people.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// The type of a tensor in the files.
    ///
    /// # Errors
    /// The model has no tensor `name`.
    pub fn dtype(&self, name: &str) -> Result<FloatType, WeightsError> {
        Ok(self.find(name)?.1.dtype)
    }

    fn find(&self, name: &str) -> Result<(&HubTensor, Place), WeightsError> {
        let found = self.names.tensor(name).zip(self.places.get(name).copied());
        found.ok_or_else(|| WeightsError::NoTensor { tensor: name.to_owned() })
    }

    /// A block of the tensor that a layout names `name`, row by row. Widening is exact, narrowing rounds to the nearest, ties
    /// to even. No more than the block and a small buffer is in memory.
    ///
    /// # Errors
    /// There is no such tensor or block, the file cannot be read, or an element is not finite, in the file or in `A`.
    pub fn read<A: Float>(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Vec<A>, WeightsError> {
        let (tensor, Place { file, dtype, offset }) = self.find(name)?;
        let dims @ [height, width] = tensor.dims;
        let inside = |range: &Range<usize>, len| range.start <= range.end && range.end <= len;
        if !inside(&rows, height) || !inside(&cols, width) {
            return Err(WeightsError::NoBlock { tensor: name.to_owned(), dims, rows, cols });
        }
        let mut block = Vec::with_capacity(rows.len() * cols.len());
        if block.capacity() == 0 {
            return Ok(block);
        }
        // Whole rows lie one after the other.
        let (runs, run) = match cols.len() == width {
            true => (1, rows.len() * width),
            false => (rows.len(), cols.len()),
        };
        let path = &self.files[file];
        let io = |source| WeightsError::Io { action: "read", path: path.clone(), source };
        let mut reader = BufReader::with_capacity(CHUNK, File::open(path).map_err(io)?);
        let first = (rows.start * width + cols.start) * dtype.size();
        reader.seek(SeekFrom::Start(offset + first as u64)).map_err(io)?;
        let mut bytes = vec![0; CHUNK.min(run * dtype.size())];
        for n in 0..runs {
            if n > 0 {
                let skip = (width - cols.len()) * dtype.size();
                reader.seek_relative(skip as i64).map_err(io)?;
            }
            let mut left = run * dtype.size();
            while left > 0 {
                let chunk = &mut bytes[..CHUNK.min(left)];
                reader.read_exact(chunk).map_err(io)?;
                left -= chunk.len();
                let start = block.len();
                dtype.decode(chunk, &mut block).map_err(|(at, value)| {
                    let at = start + at;
                    WeightsError::NotFinite {
                        path: path.clone(),
                        tensor: tensor.hub.clone(),
                        at: [rows.start + at / cols.len(), cols.start + at % cols.len()],
                        value,
                        wanted: A::DTYPE.name(),
                    }
                })?;
            }
        }
        Ok(block)
    }
}

/// Whether `folder` has the weights of a model of the hub.
pub fn is_hub_folder(folder: &Path) -> bool {
    [SINGLE, INDEX].iter().any(|name| folder.join(name).is_file())
}

/// The safetensors files of a folder with their tensors, each of which is in one file only.
///
/// # Errors
/// A file or the index is missing, malformed or cut off; a tensor is there twice; index and files disagree.
pub fn tensor_files(folder: &Path) -> Result<Vec<TensorFile>, WeightsError> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    match (single.is_file(), index.is_file()) {
        (true, false) => Ok(vec![TensorFile::open(&single)?]),
        (false, true) => shards(folder, &ShardIndex::open(&index)?),
        (true, true) => Err(WeightsError::TwoSets { folder: folder.to_owned() }),
        (false, false) => {
            let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
            let hint = match pickled.iter().any(|name| folder.join(name).is_file()) {
                true => "; pytorch_model.bin is not read: save the model with safetensors",
                false => "",
            };
            Err(WeightsError::NoWeights { folder: folder.to_owned(), hint })
        }
    }
}

/// The files that an index names, which have exactly the tensors that it has in them.
fn shards(folder: &Path, index: &ShardIndex) -> Result<Vec<TensorFile>, WeightsError> {
    let mut first: BTreeMap<&str, &str> = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        first.entry(file).or_insert(tensor);
    }
    let mut files = Vec::with_capacity(first.len());
    for (file, tensor) in first {
        let path = folder.join(file);
        if !path.is_file() {
            return Err(WeightsError::MissingShard { path, tensor: tensor.to_owned() });
        }
        files.push((file, TensorFile::open(&path)?));
    }
    let mut seen: BTreeMap<&str, &Path> = BTreeMap::new();
    for (_, TensorFile { path, tensors }) in &files {
        for tensor in tensors {
            if let Some(other) = seen.insert(&tensor.name, path) {
                let files = [other.to_owned(), path.clone()];
                return Err(WeightsError::Duplicate { tensor: tensor.name.clone(), files });
            }
        }
    }
    for (file, TensorFile { path, tensors }) in &files {
        let there: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let listed = || index.weight_map.iter().filter(|(_, listed)| listed == file);
        if let Some((tensor, _)) = listed().find(|(tensor, _)| !there.contains(tensor.as_str())) {
            return Err(WeightsError::NotInShard { path: path.clone(), tensor: tensor.clone() });
        }
        if let Some(tensor) = tensors.iter().find(|tensor| !index.weight_map.contains_key(&tensor.name)) {
            return Err(WeightsError::NotInIndex { path: path.clone(), tensor: tensor.name.clone() });
        }
    }
    Ok(files.into_iter().map(|(_, file)| file).collect())
}
