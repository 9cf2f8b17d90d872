//! Files that are complete or absent: written under another name, synced, renamed, and the rename synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the operating system refused, on which path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct IoError {
    /// A verb: `read`, `write`, `rename`, …
    pub action: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// The reason.
    pub source: io::Error,
}

/// Adds the path and the verb to an [`io::Error`].
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, IoError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, IoError> {
        self.map_err(|source| IoError { action, path: path.to_owned(), source })
    }
}

/// What the name of everything unfinished contains.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A name beside `path` for something unfinished, that nobody uses: `path.tmp-XXXX`.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    unique_name(path, TEMPORARY)
}

/// A name beside `path` that nobody uses: `path`, `mark`, and digits.
pub(crate) fn unique_name(path: &Path, mark: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let unique = blake3::hash(format!("{} {nanos} {count}", std::process::id()).as_bytes());
    let mut name = path.as_os_str().to_owned();
    name.push(mark);
    name.push(&unique.to_hex()[..12]);
    PathBuf::from(name)
}

/// Creates a file that must not exist.
pub(crate) fn create_new(path: &Path) -> Result<File, IoError> {
    OpenOptions::new().write(true).create_new(true).open(path).context("create", path)
}

/// Writes a whole new file and syncs it.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    let mut file = create_new(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).context("write", path)
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), IoError> {
    // Elsewhere folders cannot be opened, and renames are journalled.
    if cfg!(unix) {
        File::open(path).and_then(|folder| folder.sync_all()).context("sync", path)?;
    }
    Ok(())
}

/// Renames and makes the new name durable.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), IoError> {
    fs::rename(from, to).context("rename", from)?;
    match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

/// Replaces a small file by a new version of it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    let temporary = temporary_name(path);
    write_new(&temporary, bytes).and_then(|()| rename(&temporary, path)).inspect_err(|_| {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hint");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_refusal_names_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/file");
        let error = replace(&path, b"x").unwrap_err().to_string();
        assert!(error.contains("missing") && error.starts_with("cannot create"), "{error}");
        let taken = folder.path().join("taken");
        write_new(&taken, b"1").unwrap();
        assert!(write_new(&taken, b"2").is_err());
        assert_eq!(fs::read(&taken).unwrap(), b"1");
    }
}
