//! The header of a safetensors file: eight bytes of length, JSON, then the tensors' bytes
//! (<https://github.com/huggingface/safetensors#format>).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::WeightsError;

/// Bytes of the length before the JSON.
pub(super) const LENGTH: u64 = 8;

/// The longest header, as in the format's own library.
const LONGEST: u64 = 100_000_000;

/// A safetensors file of which the header is right: tensors follow each other without gaps from the end of the header to
/// the end of the file. Nothing of them is read yet.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorFile {
    /// The file.
    pub path: PathBuf,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<StoredTensor>,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its elements start in the file, row by row and little-endian.
    pub offset: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl TensorFile {
    /// Reads the header.
    ///
    /// # Errors
    /// The file cannot be read; the header is malformed, longer than the file or 100 MB, or names a tensor twice; a tensor's
    /// bytes are not as many as its shape says, lie elsewhere than after those of the one before, or are cut off.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { action: "read", path: path.to_owned(), source };
        let bad = |what: String| WeightsError::Header { path: path.to_owned(), what };
        let mut file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        if found < LENGTH {
            return Err(bad(format!("is cut off: the file has {found} bytes")));
        }
        let mut length = [0; LENGTH as usize];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST {
            return Err(bad(format!("would have {length} bytes, more than {LONGEST}")));
        }
        if length > found - LENGTH {
            return Err(bad(format!(
                "has {length} bytes, but the file ends {} after its length",
                found - LENGTH
            )));
        }
        let mut text = Vec::new();
        file.take(length).read_to_end(&mut text).map_err(io)?;
        let Header(mut entries) =
            serde_json::from_slice(&text).map_err(|error| bad(format!("is malformed: {error}")))?;
        entries.sort_by_key(|(_, info)| info.data_offsets);
        let start = LENGTH + length;
        let (mut tensors, mut end) = (Vec::with_capacity(entries.len()), 0);
        for (name, TensorInfo { dtype, shape, data_offsets: (from, to) }) in entries {
            let entry =
                |what: String| WeightsError::Entry { path: path.to_owned(), tensor: name.clone(), what };
            let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
            let bits = elements.and_then(|n| n.checked_mul(dtype.bitsize()));
            let Some(bytes) = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8) else {
                return Err(entry(format!(
                    "is {shape:?} {dtype}, which is no whole number of bytes that fits"
                )));
            };
            if from != end {
                let gap = if from > end { "a gap before it" } else { "another one in its place" };
                return Err(entry(format!(
                    "has its bytes at {from}, but there is {gap}: {end} is the next free one"
                )));
            }
            if to.checked_sub(from) != Some(bytes) {
                return Err(entry(format!(
                    "is {shape:?} {dtype}, {bytes} bytes, but has the bytes {from}..{to}"
                )));
            }
            if start.checked_add(to as u64).is_none() {
                return Err(entry(format!("would end at byte {to} of the data")));
            }
            end = to;
            tensors.push(StoredTensor {
                name,
                dtype,
                shape,
                offset: start + from as u64,
                bytes: bytes as u64,
            });
        }
        let expected = start + end as u64;
        if found > expected {
            return Err(bad(format!("describes {expected} bytes of {found} in the file")));
        }
        if let Some(cut) = tensors.iter().find(|tensor| tensor.offset + tensor.bytes > found) {
            let (path, tensor) = (path.to_owned(), cut.name.clone());
            return Err(WeightsError::Truncated { path, tensor, expected, found });
        }
        Ok(TensorFile { path: path.to_owned(), tensors })
    }
}

/// The JSON of a header: tensors under their names, each once.
struct Header(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut entries, mut names) = (Vec::new(), BTreeSet::new());
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("{name} is there twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map.next_value();
                    let info = info.map_err(|error| A::Error::custom(format_args!("{name}: {error}")))?;
                    entries.push((name, info));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
