//! The manifest: JSON that carries its own hash.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{CheckpointError, PieceFile};

/// Its name in the checkpoint's folder.
pub(super) const MANIFEST: &str = "manifest.json";

const VERSION: u32 = 1;

/// What the file consists of besides the hash and the manifest proper, so that every byte of it is checked.
const HEAD: &str = "{\"blake3\":\"";
const MIDDLE: &str = "\",\"manifest\":";
const TAIL: &str = "}\n";

/// All that there is to know about a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    /// The step after which it was written.
    pub step: u64,
    /// The run's own: cursor, configuration, …
    pub meta: Value,
    /// The files with their pieces.
    pub files: Vec<PieceFile>,
}

impl Manifest {
    pub fn new(step: u64, meta: Value, files: Vec<PieceFile>) -> Self {
        Manifest { version: VERSION, step, meta, files }
    }

    /// `{"blake3":"<hash of the inner JSON>","manifest":<inner JSON>}`.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_string(self)?;
        let hash = blake3::hash(body.as_bytes()).to_hex();
        Ok([HEAD, &hash, MIDDLE, &body, TAIL].concat().into_bytes())
    }

    /// The inverse, which accepts exactly what was written.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        let error = |what: String| CheckpointError::Manifest { path: path.to_owned(), what };
        let damaged = || error("is damaged (its checksum is wrong) or cut off".to_owned());
        let hashed = bytes.strip_prefix(HEAD.as_bytes()).and_then(|rest| rest.split_at_checked(64));
        let (hash, rest) = hashed.ok_or_else(damaged)?;
        let body = rest.strip_prefix(MIDDLE.as_bytes()).and_then(|rest| rest.strip_suffix(TAIL.as_bytes()));
        let body = body.ok_or_else(damaged)?;
        if blake3::hash(body).to_hex().as_bytes() != hash {
            return Err(damaged());
        }
        // The version first: a later one may have other fields.
        let value: Value = serde_json::from_slice(body).map_err(|e| error(format!("is malformed: {e}")))?;
        match value.get("version").and_then(Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            version => {
                let found = version.map_or("without a version".to_owned(), |v| format!("of version {v}"));
                return Err(error(format!("is {found}, but this program reads version {VERSION}")));
            }
        }
        serde_json::from_value(value).map_err(|e| error(format!("is malformed: {e}")))
    }
}
