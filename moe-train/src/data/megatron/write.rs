//! Writing indexed datasets.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::super::DataError;
use super::super::writer::narrow;
use super::checksums::{Checksum, Checksums};
use super::{HEADER, MAGIC, MegatronDType, VERSION, beside};
use crate::durable::{Context, create_new, rename, temporary_name};

/// Writes an indexed dataset document by document, each as one sequence, as Megatron's `tools/preprocess_data.py` does
/// without `--split-sentences`. The files appear when [`finish`](Self::finish) returns, and replace older ones of that name;
/// dropped before, it leaves nothing. What it keeps in memory is 4 bytes per document.
#[derive(Debug)]
pub struct MegatronWriter {
    prefix: PathBuf,
    dtype: MegatronDType,
    vocab_size: u64,
    bin: Hashed,
    /// Tokens of each document.
    lengths: Vec<u32>,
    /// Tokens since the last document's end.
    open: u32,
}

impl MegatronWriter {
    /// For tokens below `vocab_size`, which settles their type: `uint16` below 65500, else `int32`.
    ///
    /// # Errors
    /// The file cannot be created, or the vocabulary is more than an `int32` can number.
    pub fn create(prefix: &Path, vocab_size: u32) -> Result<Self, DataError> {
        const MOST: u32 = 1 << 31;
        if vocab_size > MOST {
            return Err(DataError::Vocabulary { vocab_size: vocab_size.into(), most: MOST.into() });
        }
        let bin = Hashed::create(&beside(prefix, ".bin"))?;
        let (prefix, dtype) = (prefix.to_owned(), MegatronDType::optimal(vocab_size));
        Ok(MegatronWriter { prefix, dtype, vocab_size: vocab_size.into(), bin, lengths: Vec::new(), open: 0 })
    }

    /// Adds tokens to the document that is being written.
    ///
    /// # Errors
    /// A token is not below `vocab_size`, the document has 2³¹ tokens, or the file cannot be written.
    pub fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        if let Some(&token) = tokens.iter().find(|&&token| u64::from(token) >= self.vocab_size) {
            return Err(DataError::TokenTooLarge { token, vocab_size: self.vocab_size });
        }
        let open = self.open as usize + tokens.len();
        if i32::try_from(open).is_err() {
            let (path, index) = (beside(&self.prefix, ".bin"), self.lengths.len() as u64);
            return Err(DataError::LongSequence { path, index });
        }
        self.bin.write(&narrow(tokens, self.dtype.width()))?;
        self.open = open as u32;
        Ok(())
    }

    /// Ends the document that is being written. One without tokens is a document without a sequence, as Megatron writes it.
    pub fn end_document(&mut self) {
        self.lengths.push(std::mem::take(&mut self.open));
    }

    /// Adds a document.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn document(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.append(tokens)?;
        self.end_document();
        Ok(())
    }

    /// Completes the files under their names, the index last. The last document has ended.
    ///
    /// # Errors
    /// A file cannot be written, or tokens were added since a document ended.
    pub fn finish(mut self) -> Result<(), DataError> {
        if self.open > 0 {
            return Err(DataError::OpenDocument { path: beside(&self.prefix, ".bin") });
        }
        let idx_path = beside(&self.prefix, ".idx");
        let mut idx = Hashed::create(&idx_path)?;
        self.index(&mut idx)?;
        let checksums = Checksums { bin: self.bin.sync()?, idx: idx.sync()? };
        // At no time is there an index beside tokens that are not its own.
        match fs::remove_file(&idx_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context("remove", &idx_path)?
            }
            _ => {}
        }
        self.bin.rename()?;
        checksums.write(&self.prefix)?;
        idx.rename()
    }

    fn index(&self, idx: &mut Hashed) -> Result<(), DataError> {
        let sequences = || self.lengths.iter().filter(|&&length| length > 0);
        let mut header = [0; HEADER];
        header[..9].copy_from_slice(MAGIC);
        header[9..17].copy_from_slice(&VERSION.to_le_bytes());
        header[17] = self.dtype.code();
        header[18..26].copy_from_slice(&(sequences().count() as u64).to_le_bytes());
        header[26..34].copy_from_slice(&(self.lengths.len() as u64 + 1).to_le_bytes());
        idx.write(&header)?;
        for length in sequences() {
            idx.write(&length.to_le_bytes())?;
        }
        let mut pointer = 0_u64;
        for &length in sequences() {
            idx.write(&pointer.to_le_bytes())?;
            pointer += u64::from(length) * self.dtype.width() as u64;
        }
        let mut sequence = 0_u64;
        idx.write(&sequence.to_le_bytes())?;
        for &length in &self.lengths {
            sequence += u64::from(length > 0);
            idx.write(&sequence.to_le_bytes())?;
        }
        Ok(())
    }
}

/// A file under another name, and the hash of what was written to it.
#[derive(Debug)]
struct Hashed {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    renamed: bool,
}

impl Hashed {
    fn create(path: &Path) -> Result<Self, DataError> {
        let temporary = temporary_name(path);
        let file = BufWriter::with_capacity(1 << 16, create_new(&temporary)?);
        let (path, hasher) = (path.to_owned(), blake3::Hasher::new());
        Ok(Hashed { path, temporary, file, hasher, bytes: 0, renamed: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(self.file.write_all(bytes).context("write", &self.temporary)?)
    }

    /// Returns when all of it is on the disk.
    fn sync(&mut self) -> Result<Checksum, DataError> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_all()).context("write", &self.temporary)?;
        Ok(Checksum::new(self.bytes, &self.hasher))
    }

    fn rename(mut self) -> Result<(), DataError> {
        rename(&self.temporary, &self.path)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Hashed {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}
