//! Writing token files.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::super::DataError;
use super::super::writer::narrow;
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
    tokens: u64,
    offsets: Vec<u64>,
    /// Bits of tokens, once a document has a mask.
    mask: Option<Vec<u8>>,
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
            tokens: 0,
            offsets: vec![0],
            mask: None,
            finished: false,
        })
    }

    /// Adds tokens, all of them learnt, to the document that is being written.
    ///
    /// # Errors
    /// A token is not below `vocab_size`, or the file cannot be written.
    pub fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.check(tokens)?;
        self.push(tokens, true)
    }

    /// Ends the document that is being written, which may have no tokens.
    pub fn end_document(&mut self) {
        self.offsets.push(self.tokens);
    }

    /// Adds a document, all of whose tokens are learnt.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn document(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.append(tokens)?;
        self.end_document();
        Ok(())
    }

    /// Adds a document that is a prompt, which is read, and its completion, which is learnt: the loss counts only tokens of the
    /// completion as targets. The file has a mask then.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn completion(&mut self, prompt: &[u32], completion: &[u32]) -> Result<(), DataError> {
        self.check(prompt)?;
        self.check(completion)?;
        let before = self.tokens as usize;
        self.mask.get_or_insert_with(|| {
            let mut mask = Vec::new();
            mask_tokens(&mut mask, 0, before, true);
            mask
        });
        self.push(prompt, false)?;
        self.push(completion, true)?;
        self.end_document();
        Ok(())
    }

    /// Completes the file under its name. Its last document has ended.
    ///
    /// # Errors
    /// The file cannot be written, or tokens were added since a document ended.
    pub fn finish(mut self) -> Result<(), DataError> {
        let tokens = self.tokens;
        if self.offsets.last() != Some(&tokens) {
            return Err(DataError::OpenDocument { path: self.path.clone() });
        }
        let used = tokens as usize * self.width;
        self.write(&[0; 8][..used.next_multiple_of(8) - used])?;
        let offsets: Vec<u8> = self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        self.write(&offsets)?;
        let mask = self.mask.take();
        let masked = mask.is_some();
        if let Some(mut mask) = mask {
            mask.resize(mask.len().next_multiple_of(8), 0);
            self.write(&mask)?;
        }
        let header = Header {
            width: self.width,
            vocab_size: self.vocab_size,
            tokens,
            documents: self.offsets.len() as u64 - 1,
            masked,
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

    fn check(&self, tokens: &[u32]) -> Result<(), DataError> {
        match tokens.iter().find(|&&token| u64::from(token) >= self.vocab_size) {
            Some(&token) => Err(DataError::TokenTooLarge { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    fn push(&mut self, tokens: &[u32], learnt: bool) -> Result<(), DataError> {
        self.write(&narrow(tokens, self.width))?;
        if let Some(mask) = &mut self.mask {
            mask_tokens(mask, self.tokens, tokens.len(), learnt);
        }
        self.tokens += tokens.len() as u64;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        Ok(self.file.write_all(bytes).context("write", &self.temporary)?)
    }
}

/// Appends `count` bits, from bit `first` on, which is where `mask` ends.
fn mask_tokens(mask: &mut Vec<u8>, first: u64, count: usize, learnt: bool) {
    for i in first..first + count as u64 {
        if i % 8 == 0 {
            mask.push(0);
        }
        if let Some(last) = mask.last_mut() {
            *last |= u8::from(learnt) << (i % 8);
        }
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
