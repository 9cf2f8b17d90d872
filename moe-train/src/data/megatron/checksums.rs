//! `PREFIX.blake3.json`: checksums that Megatron's format has no place for.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::DataError;
use super::{Fault, beside};
use crate::durable::{Context, replace};

const EXTENSION: &str = ".blake3.json";
/// More than the file ever has.
const MOST_BYTES: u64 = 4096;

/// Of the two files of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Checksums {
    pub bin: Checksum,
    pub idx: Checksum,
}

/// Of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Checksum {
    /// The size of the file.
    pub bytes: u64,
    /// In hexadecimal.
    pub blake3: String,
}

impl Checksum {
    /// Of what was hashed.
    pub fn new(bytes: u64, hasher: &blake3::Hasher) -> Self {
        Checksum { bytes, blake3: hasher.finalize().to_hex().to_string() }
    }
}

impl Checksums {
    /// Reads those beside a dataset, if there are any.
    pub fn read(prefix: &Path) -> Result<Option<Self>, DataError> {
        let fault = |what: String| DataError::Megatron {
            prefix: prefix.to_owned(),
            fault: Fault::Checksums { what },
        };
        let path = beside(prefix, EXTENSION);
        let bytes = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.len() > MOST_BYTES => {
                return Err(fault(format!("{} bytes, more than {MOST_BYTES}", metadata.len())));
            }
            other => other.and_then(|_| fs::read(&path)).context("read", &path)?,
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| fault(error.to_string()))
    }

    /// Replaces those beside a dataset.
    pub fn write(&self, prefix: &Path) -> Result<(), DataError> {
        let path = beside(prefix, EXTENSION);
        let bytes = serde_json::to_vec(self).map_err(io::Error::from).context("write", &path)?;
        Ok(replace(&path, &bytes)?)
    }
}
