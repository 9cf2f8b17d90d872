//! Text as documents.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use super::DataError;
use crate::durable::Context;

/// A file is one document, unless it is longer than this; then it is cut into several, after the last line end before
/// this length where there is one, else between two characters. So a single long text can be trained on and held out from.
pub const MAX_DOCUMENT_BYTES: usize = 64 * 1024;

/// Bytes that are searched for a line end at a time.
const BLOCK: u64 = 4096;

/// Where the document ends that starts at byte `start` of a text of `len` bytes. It depends on nothing before `start`, and
/// reads backwards from the longest document, as far as to the last line end.
pub(super) fn document_end(file: &mut File, path: &Path, start: u64, len: u64) -> Result<u64, DataError> {
    let longest = start + MAX_DOCUMENT_BYTES as u64;
    if len <= longest {
        return Ok(len);
    }
    let mut block = [0; BLOCK as usize];
    let mut end = longest;
    while end > start {
        let from = end.saturating_sub(BLOCK).max(start);
        let block = &mut block[..(end - from) as usize];
        read_at(file, path, from, block)?;
        if let Some(at) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(from + at as u64 + 1);
        }
        end = from;
    }
    // No character of UTF-8 has more than three bytes that continue it. The byte after the longest document is there.
    let mut last = [0; 4];
    read_at(file, path, longest - 3, &mut last)?;
    let starts = |&at: &usize| last[at] & 0xC0 != 0x80;
    Ok((0..last.len()).rev().find(starts).map_or(longest, |at| longest - 3 + at as u64))
}

/// Fills `bytes` from byte `start` on.
pub(super) fn read_at(file: &mut File, path: &Path, start: u64, bytes: &mut [u8]) -> Result<(), DataError> {
    match file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(bytes)) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            Err(DataError::Changed { path: path.to_owned() })
        }
        read => Ok(read.context("read", path)?),
    }
}
