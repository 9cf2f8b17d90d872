//! Reading token files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::super::DataError;
use super::super::map::map;
use super::{Fault, HEADER, Header, u64_at};

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// A token file, mapped into memory, so that it may be larger than that.
///
/// Opening checks the header and the length; [`verify`](Self::verify) checks every byte. While it is open, no other
/// program may write to the file or shorten it (replacing it by a rename is fine).
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
    /// Where the document offsets start.
    index: usize,
    /// Where the mask starts, if there is one.
    mask: Option<usize>,
}

impl TokenFile {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, or is foreign, cut off or damaged in its header.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let fault = |fault| DataError::TokenFile { path: path.to_owned(), fault };
        let map = map(path)?;
        let found = map.len() as u64;
        let header = Header::from_bytes(&map).map_err(fault)?;
        let [index, mask, expected] = header.extent().ok_or(Fault::Header).map_err(fault)?;
        if found != expected {
            return Err(fault(Fault::Length { expected, found }));
        }
        // Both are inside of the mapping.
        let (index, mask) = (index as usize, header.masked.then_some(mask as usize));
        Ok(TokenFile { path: path.to_owned(), map, header, index, mask })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of tokens.
    pub fn len(&self) -> u64 {
        self.header.tokens
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.header.tokens == 0
    }

    /// All tokens are below this.
    pub fn vocab_size(&self) -> u64 {
        self.header.vocab_size
    }

    /// The number of documents.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// The tokens of document `i`, as a range of the file's tokens.
    ///
    /// # Errors
    /// There is no such document, or where it is said to be.
    pub fn document(&self, i: u64) -> Result<Range<u64>, DataError> {
        let len = self.header.documents;
        if i >= len {
            let end = i.saturating_add(1);
            return Err(self.fault(Fault::OutOfRange { what: "documents", start: i, end, len }));
        }
        // The offsets of all documents are inside of the file, so this does not overflow.
        let at = self.index + 8 * i as usize;
        let (start, end) = (u64_at(&self.map, at), u64_at(&self.map, at + 8));
        match start <= end && end <= self.len() {
            true => Ok(start..end),
            false => Err(self.fault(Fault::Document { i, start, end })),
        }
    }

    /// Some of the tokens.
    ///
    /// # Errors
    /// The range reaches beyond the end.
    pub fn tokens(&self, range: Range<u64>) -> Result<Vec<u32>, DataError> {
        let len = self.header.tokens;
        if range.start > range.end || range.end > len {
            let Range { start, end } = range;
            return Err(self.fault(Fault::OutOfRange { what: "tokens", start, end, len }));
        }
        // All tokens are inside of the mapping, so this does not overflow.
        let width = self.header.width;
        let at = |token: u64| HEADER + token as usize * width;
        Ok(widen(&self.map[at(range.start)..at(range.end)], width))
    }

    /// Whether some tokens are not to be learnt.
    pub fn is_masked(&self) -> bool {
        self.header.masked
    }

    /// Which of some tokens the loss counts as targets; all of them in a file without a mask.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn mask(&self, range: Range<u64>) -> Result<Vec<bool>, DataError> {
        let Some(mask) = self.mask else { return Ok(vec![true; self.tokens(range)?.len()]) };
        let len = self.header.tokens;
        if range.start > range.end || range.end > len {
            let Range { start, end } = range;
            return Err(self.fault(Fault::OutOfRange { what: "tokens", start, end, len }));
        }
        // All bits are inside of the mapping, so this does not overflow.
        Ok(range.map(|i| self.map[mask + (i / 8) as usize] & (1 << (i % 8)) != 0).collect())
    }

    /// Reads everything once and compares checksums.
    ///
    /// # Errors
    /// A byte changed since the file was written.
    pub fn verify(&self) -> Result<(), DataError> {
        let mut hasher = blake3::Hasher::new();
        for chunk in self.map[HEADER..].chunks(CHUNK) {
            hasher.update(chunk);
        }
        match hasher.finalize() == self.header.content {
            true => Ok(()),
            false => Err(self.fault(Fault::Content)),
        }
    }

    fn fault(&self, fault: Fault) -> DataError {
        DataError::TokenFile { path: self.path.clone(), fault }
    }
}

fn widen(bytes: &[u8], width: usize) -> Vec<u32> {
    match width {
        1 => bytes.iter().map(|&b| u32::from(b)).collect(),
        2 => bytes.as_chunks().0.iter().map(|&b| u32::from(u16::from_le_bytes(b))).collect(),
        _ => bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect(),
    }
}
