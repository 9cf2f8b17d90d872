//! Writing token files.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::super::DataError;
use super::{HEADER, Header};
use crate::durable::{Context, create_new, rename, temporary_name};

/// Writes a token file document by document. The file appears when [`finish`](Self::finish) returns, and replaces an
/// older one of that name; dropped before, it leaves nothing.
#[derive(Debug)]
pub struct TokenFileWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    width: usize,
    vocab_size: u64,
    offsets: Vec<u64>,
    finished: bool,
}

impl TokenFileWriter {
    /// For tokens below `vocab_size`, which settles the bytes of a token: 1, 2 or 4.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path, vocab_size: u32) -> Result<Self, DataError> {
        let temporary = temporary_name(path);
        let mut file = BufWriter::new(create_new(&temporary)?);
        file.write_all(&[0; HEADER]).context("write", &temporary)?;
        let width = match vocab_size {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 4,
        };
        Ok(TokenFileWriter {
            path: path.to_owned(),
            temporary,
            file,
            hasher: blake3::Hasher::new(),
            width,
            vocab_size: vocab_size.into(),
            offsets: vec![0],
            finished: false,
        })
    }

    /// Adds a document.
    ///
    /// # Errors
    /// A token is not below `vocab_size`, or the file cannot be written.
    pub fn document(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        if let Some(&token) = tokens.iter().find(|&&token| u64::from(token) >= self.vocab_size) {
            return Err(DataError::TokenTooLarge { token, vocab_size: self.vocab_size });
        }
        let bytes: Vec<u8> =
            tokens.iter().flat_map(|token| token.to_le_bytes().into_iter().take(self.width)).collect();
        self.offsets.push(self.tokens() + tokens.len() as u64);
        self.append(&bytes)
    }

    /// Completes the file under its name.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self) -> Result<(), DataError> {
        let tokens = self.tokens();
        let used = tokens as usize * self.width;
        self.append(&[0; 8][..used.next_multiple_of(8) - used])?;
        let offsets: Vec<u8> = self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        self.append(&offsets)?;
        let header = Header {
            width: self.width,
            vocab_size: self.vocab_size,
            tokens,
            documents: self.offsets.len() as u64 - 1,
            content: self.hasher.finalize().into(),
        };
        let complete = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header.to_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()
        };
        complete(&mut self.file).context("write", &self.temporary)?;
        rename(&self.temporary, &self.path)?;
        self.finished = true;
        Ok(())
    }

    /// Tokens so far: the last offset.
    fn tokens(&self) -> u64 {
        self.offsets.last().copied().unwrap_or(0)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        Ok(self.file.write_all(bytes).context("write", &self.temporary)?)
    }
}

impl Drop for TokenFileWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}
