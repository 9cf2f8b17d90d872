//! The files that are read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::super::DataError;
use crate::durable::Context;

/// What a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum InputFormat {
    /// A text: `.txt`, `.text` or `.md`.
    Text,
    /// A JSON object a line: `.jsonl`, `.ndjson` or `.json`.
    Jsonl,
    /// Columns: `.parquet`.
    Parquet,
}

impl InputFormat {
    /// What the name of a file says.
    pub(crate) fn of(path: &Path) -> Result<Self, DataError> {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        match extension.as_deref() {
            Some("txt" | "text" | "md") => Ok(InputFormat::Text),
            Some("jsonl" | "ndjson" | "json") => Ok(InputFormat::Jsonl),
            Some("parquet") => Ok(InputFormat::Parquet),
            Some(compressed @ ("gz" | "zst" | "zstd" | "bz2" | "xz" | "zip" | "lz4")) => {
                let what = format!("files compressed as .{compressed} are not read: decompress it");
                Err(DataError::Input { path: path.to_owned(), what })
            }
            _ => {
                let what = "its name does not say whether it is text, JSON lines or Parquet: name it .txt, .jsonl or .parquet, \
                            or use --input-format";
                Err(DataError::Input { path: path.to_owned(), what: what.to_owned() })
            }
        }
    }
}

/// A file, as it is when everything starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Input {
    pub path: PathBuf,
    pub format: InputFormat,
    /// Its size.
    pub bytes: u64,
    /// When it was modified last, in nanoseconds since 1970.
    pub modified: u64,
}

impl Input {
    /// Looks at all files, in order.
    pub fn open_all(paths: &[PathBuf], format: Option<InputFormat>) -> Result<Vec<Self>, DataError> {
        paths.iter().map(|path| Self::open(path, format)).collect()
    }

    fn open(path: &Path, format: Option<InputFormat>) -> Result<Self, DataError> {
        let metadata = fs::metadata(path).context("read", path)?;
        if !metadata.is_file() {
            let what = "it is no file: name the files themselves".to_owned();
            return Err(DataError::Input { path: path.to_owned(), what });
        }
        let format = format.map_or_else(|| InputFormat::of(path), Ok)?;
        if format == InputFormat::Parquet && cfg!(not(feature = "parquet")) {
            return Err(DataError::Feature { path: path.to_owned(), feature: "parquet" });
        }
        let modified = metadata.modified().context("read", path)?.duration_since(UNIX_EPOCH);
        let modified = modified.map_or(0, |since| since.as_nanos() as u64);
        Ok(Input { path: path.to_owned(), format, bytes: metadata.len(), modified })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_a_file_has() {
        for (name, format) in [
            ("a.txt", InputFormat::Text),
            ("README.md", InputFormat::Text),
            ("part-0.JSONL", InputFormat::Jsonl),
            ("c4-train.json", InputFormat::Jsonl),
            ("a.b.parquet", InputFormat::Parquet),
        ] {
            assert_eq!(InputFormat::of(name.as_ref()).unwrap(), format, "{name}");
        }
        for (name, what) in [
            ("a", "--input-format"),
            ("main.rs", "--input-format"),
            ("a.jsonl.gz", "a.jsonl.gz: files compressed as .gz are not read: decompress it"),
        ] {
            let error = InputFormat::of(name.as_ref()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
