//! `model.safetensors.index.json`: which tensor is in which file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::WeightsError;

/// The longest index that is read.
const LONGEST: u64 = 100_000_000;

/// Files by tensor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct ShardIndex {
    /// The file of each tensor, a name in the folder of the index.
    #[serde(deserialize_with = "once")]
    pub weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads it.
    ///
    /// # Errors
    /// It cannot be read, is malformed or longer than 100 MB, names a tensor twice, or a file elsewhere than in its folder.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { action: "read", path: path.to_owned(), source };
        let bad = |what: String| WeightsError::Index { path: path.to_owned(), what };
        let mut text = Vec::new();
        File::open(path).map_err(io)?.take(LONGEST + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > LONGEST {
            return Err(bad(format!("has more than {LONGEST} bytes")));
        }
        let index: Self =
            serde_json::from_slice(&text).map_err(|error| bad(format!("is malformed: {error}")))?;
        for (tensor, file) in &index.weight_map {
            let mut parts = Path::new(file).components();
            let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
                return Err(bad(format!(
                    "has {tensor} in {file:?}, which is no name of a file in its folder"
                )));
            };
        }
        Ok(index)
    }
}

/// A map whose keys are there once.
fn once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Once;
    impl<'de> Visitor<'de> for Once {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("files by tensor")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut files = BTreeMap::new();
            while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                if files.contains_key(&tensor) {
                    return Err(A::Error::custom(format_args!("{tensor} is there twice")));
                }
                files.insert(tensor, file);
            }
            Ok(files)
        }
    }
    deserializer.deserialize_map(Once)
}
