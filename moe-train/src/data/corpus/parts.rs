//! The folder of parts.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};

use super::super::{DataError, TokenFile};
use super::manifest::Manifest;
use crate::durable::{Context, IoError, TEMPORARY, rename, replace, temporary_name};

const FOLDER: &str = ".parts";
const MANIFEST: &str = "manifest.json";
const PART: &str = "part-";

/// `OUT.parts`: a manifest, and token files that are complete or absent.
#[derive(Debug)]
pub(super) struct Parts {
    folder: PathBuf,
}

/// What there is of a part.
pub(super) enum Part {
    Absent,
    /// It was written, and is no more what was written.
    Damaged,
    Whole(TokenFile),
}

impl Parts {
    /// Makes the folder, or opens the one that is there.
    ///
    /// # Errors
    /// It has parts of something else, or there is no place for it.
    pub fn open(out: &Path, manifest: &Manifest) -> Result<Self, DataError> {
        if out.is_dir() {
            let source = Error::from(ErrorKind::IsADirectory);
            Err(IoError { action: "write", path: out.to_owned(), source })?;
        }
        let mut folder = out.as_os_str().to_owned();
        folder.push(FOLDER);
        let folder = PathBuf::from(folder);
        let path = folder.join(MANIFEST);
        let refuse = |what: String| DataError::Parts { folder: folder.clone(), what };
        match fs::read(&path) {
            Ok(bytes) => {
                let then: Manifest = serde_json::from_slice(&bytes)
                    .map_err(|error| refuse(format!("something else ({MANIFEST}: {error})")))?;
                match then.difference(manifest) {
                    None => {}
                    Some(what) => return Err(refuse(what)),
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                fs::create_dir_all(&folder).context("create", &folder)?;
                // Nothing is taken for a part that has no manifest, and nothing that is not ours is in the way.
                for entry in fs::read_dir(&folder).context("read", &folder)? {
                    let entry = entry.context("read", &folder)?;
                    let name = entry.file_name();
                    match name.to_str() {
                        Some(name) if name.starts_with(PART) || name.starts_with(MANIFEST) => {
                            fs::remove_file(entry.path()).context("remove", &entry.path())?;
                        }
                        _ => return Err(refuse(format!("something else (it has {})", name.display()))),
                    }
                }
                let bytes =
                    serde_json::to_vec_pretty(manifest).map_err(Error::from).context("write", &path)?;
                replace(&path, &bytes)?;
            }
            Err(error) => Err(error).context("read", &path)?,
        }
        Ok(Parts { folder })
    }

    /// The file of part `i`.
    pub fn path(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{PART}{i:06}.tokens"))
    }

    /// Reads all of part `i`.
    pub fn find(&self, i: usize) -> Result<Part, DataError> {
        let path = self.path(i);
        if !path.exists() {
            return Ok(Part::Absent);
        }
        let opened = TokenFile::open(&path).and_then(|file| file.verify().map(|()| file));
        match opened {
            Ok(file) => Ok(Part::Whole(file)),
            Err(DataError::TokenFile { .. }) => Ok(Part::Damaged),
            Err(error) => Err(error),
        }
    }

    /// Removes the folder. Nobody finds half of it, should that be interrupted.
    pub fn remove(&self) -> Result<(), DataError> {
        let gone = temporary_name(&self.folder);
        rename(&self.folder, &gone)?;
        Ok(fs::remove_dir_all(&gone).context("remove", &gone)?)
    }
}

/// Removes what an interrupted join to `out`, or the removal of its parts, left beside it.
pub(super) fn remove_leftovers(out: &Path) -> Result<(), DataError> {
    let (Some(name), Some(folder)) = (out.file_name().and_then(|name| name.to_str()), out.parent()) else {
        return Ok(());
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    for entry in fs::read_dir(folder).context("read", folder)? {
        let entry = entry.context("read", folder)?;
        let found = entry.file_name();
        let Some((of, digits)) = found.to_str().and_then(|found| found.rsplit_once(TEMPORARY)) else {
            continue;
        };
        let ours = of
            .strip_prefix(name)
            .is_some_and(|rest| ["", ".bin", ".idx", ".blake3.json", FOLDER].contains(&rest));
        if ours && digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.context("remove", &path)?;
        }
    }
    Ok(())
}
