//! Reading indexed datasets.

use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::super::DataError;
use super::super::map::map;
use super::checksums::{Checksum, Checksums};
use super::{Fault, MegatronDType, MegatronIndex, beside};

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// An indexed dataset, both files mapped into memory, so that they may be larger than that.
///
/// Opening reads the index once and checks it; [`verify`](Self::verify) reads the tokens. While it is open, no other program may
/// write to the files or shorten them (replacing them by a rename is fine).
#[derive(Debug)]
pub struct MegatronFile {
    prefix: PathBuf,
    index: MegatronIndex<Mmap>,
    bin: Mmap,
}

impl MegatronFile {
    /// Opens `PREFIX.bin` and `PREFIX.idx`.
    ///
    /// # Errors
    /// They cannot be read, or the index is not one or not that of the tokens.
    pub fn open(prefix: &Path) -> Result<Self, DataError> {
        let bin = map(&beside(prefix, ".bin"))?;
        let index = MegatronIndex::new(map(&beside(prefix, ".idx"))?, bin.len() as u64)
            .map_err(|fault| DataError::Megatron { prefix: prefix.to_owned(), fault })?;
        Ok(MegatronFile { prefix: prefix.to_owned(), index, bin })
    }

    /// Whether there are files of that prefix.
    pub fn exists(prefix: &Path) -> bool {
        [".bin", ".idx"].iter().all(|extension| beside(prefix, extension).is_file())
    }

    /// Both files without their extensions.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// How tokens are stored.
    pub fn dtype(&self) -> MegatronDType {
        self.index.dtype()
    }

    /// The number of tokens.
    pub fn len(&self) -> u64 {
        self.index.tokens()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of sequences.
    pub fn sequences(&self) -> u64 {
        self.index.sequences()
    }

    /// The number of documents.
    pub fn documents(&self) -> u64 {
        self.index.documents()
    }

    /// The tokens of document `i`, as a range of all tokens.
    ///
    /// # Errors
    /// There is no such document.
    pub fn document(&self, i: u64) -> Result<Range<u64>, DataError> {
        let (end, len) = (i.saturating_add(1), self.documents());
        let fault = || self.fault(Fault::OutOfRange { what: "documents", start: i, end, len });
        self.index.document(i).ok_or_else(fault)
    }

    /// Some of the tokens.
    ///
    /// # Errors
    /// The range reaches beyond the end, or one of them is negative.
    pub fn tokens(&self, range: Range<u64>) -> Result<Vec<u32>, DataError> {
        let len = self.len();
        let Range { start, end } = range;
        if start > end || end > len {
            return Err(self.fault(Fault::OutOfRange { what: "tokens", start, end, len }));
        }
        // All tokens are inside of the mapping, so this does not overflow.
        let at = |token: u64| token as usize * self.dtype().width();
        let values = widen(&self.bin[at(start)..at(end)], self.dtype());
        values.map_err(|(i, value)| self.fault(Fault::Token { position: start + i as u64, value }))
    }

    /// Reads everything once: that no token is negative, and that checksums are those of `PREFIX.blake3.json`, if there is
    /// such a file. Whether there is.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify(&self) -> Result<bool, DataError> {
        let step = (CHUNK / self.dtype().width()) as u64;
        let (mut hasher, mut start) = (blake3::Hasher::new(), 0);
        while start < self.len() {
            let end = self.len().min(start + step);
            self.tokens(start..end)?;
            let at = |token: u64| token as usize * self.dtype().width();
            hasher.update(&self.bin[at(start)..at(end)]);
            start = end;
        }
        let Some(checksums) = Checksums::read(&self.prefix)? else { return Ok(false) };
        let bin = Checksum::new(self.bin.len() as u64, &hasher);
        hasher.reset();
        for chunk in self.index.bytes().chunks(CHUNK) {
            hasher.update(chunk);
        }
        let idx = Checksum::new(self.index.bytes().len() as u64, &hasher);
        for (file, written, found) in [("idx", checksums.idx, idx), ("bin", checksums.bin, bin)] {
            if written != found {
                return Err(self.fault(Fault::Content { file }));
            }
        }
        Ok(true)
    }

    fn fault(&self, fault: Fault) -> DataError {
        DataError::Megatron { prefix: self.prefix.clone(), fault }
    }
}

/// Tokens from bytes, or the first that is none, with its place.
fn widen(bytes: &[u8], dtype: MegatronDType) -> Result<Vec<u32>, (usize, i64)> {
    fn each<const N: usize, T: Into<i64>>(
        bytes: &[u8],
        read: fn([u8; N]) -> T,
    ) -> Result<Vec<u32>, (usize, i64)> {
        let values = bytes.as_chunks().0.iter().map(|&bytes| read(bytes).into());
        values.enumerate().map(|(i, value)| u32::try_from(value).map_err(|_| (i, value))).collect()
    }
    match dtype {
        MegatronDType::U8 => each(bytes, u8::from_le_bytes),
        MegatronDType::I8 => each(bytes, i8::from_le_bytes),
        MegatronDType::I16 => each(bytes, i16::from_le_bytes),
        MegatronDType::I32 => each(bytes, i32::from_le_bytes),
        MegatronDType::I64 => each(bytes, i64::from_le_bytes),
        MegatronDType::U16 => each(bytes, u16::from_le_bytes),
    }
}
