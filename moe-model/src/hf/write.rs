//! Weights into files of the hub's layout, tensor by tensor.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use moe_kernels::Float;
use serde_json::{Map, Value, json};

use super::folder::{INDEX, SINGLE};
use super::header::LENGTH;
use super::names::HubTensor;
use super::{FloatType, WeightsError};

/// Bytes that are encoded at a time.
const CHUNK: usize = 1 << 16;

/// Which tensor goes to which file, and in which type.
#[derive(Debug, Clone, PartialEq)]
pub struct WritePlan<'a> {
    shards: Vec<Vec<(&'a HubTensor, FloatType)>>,
}

impl<'a> WritePlan<'a> {
    /// Tensors in their order, a new file where the next one would make a file's tensors more than `max_shard_size` bytes;
    /// one that is larger has a file for itself.
    pub fn new(tensors: impl IntoIterator<Item = (&'a HubTensor, FloatType)>, max_shard_size: u64) -> Self {
        let mut shards: Vec<Vec<_>> = Vec::new();
        let mut size = 0;
        for (tensor, dtype) in tensors {
            let bytes = bytes(tensor, dtype);
            match shards.last_mut() {
                Some(shard) if size + bytes <= max_shard_size => shard.push((tensor, dtype)),
                _ => {
                    shards.push(vec![(tensor, dtype)]);
                    size = 0;
                }
            }
            size += bytes;
        }
        // As the format's own library: elements of larger types first, so that all are aligned, then by name.
        for shard in &mut shards {
            shard.sort_by(|(a, a_type), (b, b_type)| {
                b_type.size().cmp(&a_type.size()).then(a.hub.cmp(&b.hub))
            });
        }
        WritePlan { shards }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().flatten().map(|&(tensor, dtype)| bytes(tensor, dtype)).sum()
    }

    /// Writes the files to `folder`, which must have none of them, and the index if there are several, and syncs them.
    /// `fill` gives the elements of each tensor, in order, whole or in parts.
    ///
    /// # Errors
    /// Those of `fill`; a file cannot be written; an element is not finite, here or in its type; a tensor is given more or
    /// fewer elements than it has.
    pub fn write<E: From<WeightsError>>(
        &self,
        folder: &Path,
        mut fill: impl FnMut(&HubTensor, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut weight_map = Map::new();
        for (n, shard) in self.shards.iter().enumerate() {
            let name = match self.shards.len() {
                1 => SINGLE.to_owned(),
                shards => format!("model-{:05}-of-{shards:05}.safetensors", n + 1),
            };
            let path = folder.join(&name);
            let io = |source| WeightsError::Io { action: "write", path: path.clone(), source };
            let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(io)?;
            let mut file = BufWriter::with_capacity(1 << 20, file);
            file.write_all(&header(shard)).map_err(io)?;
            for &(tensor, dtype) in shard {
                let mut sink = TensorSink { file: &mut file, path: &path, tensor, dtype, given: 0 };
                fill(tensor, &mut sink)?;
                let (expected, given) = (tensor.len(), sink.given);
                if given != expected {
                    return Err(WeightsError::Length { tensor: tensor.hub.clone(), expected, given }.into());
                }
                weight_map.insert(tensor.hub.clone(), Value::from(name.clone()));
            }
            file.flush().and_then(|()| file.get_ref().sync_all()).map_err(io)?;
        }
        if self.shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": self.bytes() }, "weight_map": weight_map });
            let path = folder.join(INDEX);
            let io = |source| WeightsError::Io { action: "write", path: path.clone(), source };
            let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(io)?;
            let text = format!("{index:#}\n");
            file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
        }
        Ok(())
    }
}

/// Takes the elements of one tensor.
#[derive(Debug)]
pub struct TensorSink<'a> {
    file: &'a mut BufWriter<File>,
    path: &'a PathBuf,
    tensor: &'a HubTensor,
    dtype: FloatType,
    given: usize,
}

impl TensorSink<'_> {
    /// The next elements, row by row. Widened exactly, or rounded to the nearest, ties to even.
    ///
    /// # Errors
    /// The file cannot be written; an element is not finite, here or in the tensor's type.
    pub fn put<A: Float>(&mut self, elements: &[A]) -> Result<(), WeightsError> {
        let mut bytes = Vec::with_capacity(CHUNK);
        for elements in elements.chunks(CHUNK / self.dtype.size()) {
            bytes.clear();
            self.dtype.encode(elements, &mut bytes).map_err(|(at, value)| {
                let (at, width) = (self.given + at, self.tensor.dims[1]);
                WeightsError::NotFinite {
                    path: self.path.clone(),
                    tensor: self.tensor.hub.clone(),
                    at: [at / width, at % width],
                    value,
                    wanted: self.dtype.name(),
                }
            })?;
            let io = |source| WeightsError::Io { action: "write", path: self.path.clone(), source };
            self.file.write_all(&bytes).map_err(io)?;
            self.given += elements.len();
        }
        Ok(())
    }
}

fn bytes(tensor: &HubTensor, dtype: FloatType) -> u64 {
    tensor.len() as u64 * dtype.size() as u64
}

/// Length and JSON, filled up with spaces so that the tensors' bytes start at a multiple of 8.
fn header(shard: &[(&HubTensor, FloatType)]) -> Vec<u8> {
    let (mut entries, mut end) = (Map::new(), 0);
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    for &(tensor, dtype) in shard {
        let start = end;
        end += bytes(tensor, dtype);
        let entry = json!({ "dtype": dtype.dtype().to_string(), "shape": tensor.shape, "data_offsets": [start, end] });
        entries.insert(tensor.hub.clone(), entry);
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(LENGTH as usize), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}
