//! The crate's only `unsafe`: mapping a file into memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::durable::{Context, IoError};

/// Opens a file and maps it for reading.
pub(super) fn map(path: &Path) -> Result<Mmap, IoError> {
    let file = File::open(path).context("open", path)?;
    // SAFETY: the bytes behind the slice must not change while it lives. Files of tokens are written under another name and
    // renamed when they are complete; nothing in this crate opens one for writing again, and replacing one by a rename
    // leaves the mapped file as it is. The bytes are plain `u8`, for which every value is valid. A foreign process that
    // shortens the file gets this process a bus error rather than wrong tokens; that is documented on `TokenFile` and
    // `MegatronFile`.
    unsafe { Mmap::map(&file) }.context("map", path)
}
