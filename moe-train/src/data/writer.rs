//! Where documents of tokens are written to.

use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{DataError, MegatronWriter, TokenFileWriter};

/// The format of a file of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DocumentFormat {
    /// A token file of this program.
    Tokens,
    /// Megatron's `.bin` and `.idx`.
    Megatron,
}

impl DocumentFormat {
    /// Begins a file, or the files with a prefix, of tokens below `vocab_size`.
    ///
    /// # Errors
    /// It cannot be created, or the format does not take so large a vocabulary.
    pub fn create(self, path: &Path, vocab_size: u32) -> Result<Box<dyn DocumentWriter>, DataError> {
        Ok(match self {
            DocumentFormat::Tokens => Box::new(TokenFileWriter::create(path, vocab_size)?),
            DocumentFormat::Megatron => Box::new(MegatronWriter::create(path, vocab_size)?),
        })
    }
}

/// Takes documents of tokens, in order, in whichever format.
///
/// What it makes appears under its name when [`finish`](Self::finish) returns, and replaces what was there; dropped before, it
/// leaves nothing.
pub trait DocumentWriter: Send {
    /// Adds tokens to the document that is being written.
    ///
    /// # Errors
    /// A token is not in the vocabulary, the document is too long for the format, or the file cannot be written.
    fn append(&mut self, tokens: &[u32]) -> Result<(), DataError>;

    /// Ends the document, which may have no tokens.
    fn end_document(&mut self);

    /// Adds a whole document.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    fn document(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.append(tokens)?;
        self.end_document();
        Ok(())
    }

    /// Completes what is written. Its last document has ended.
    ///
    /// # Errors
    /// It cannot be written, or tokens were added since a document ended.
    fn finish(self: Box<Self>) -> Result<(), DataError>;
}

impl DocumentWriter for TokenFileWriter {
    fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.append(tokens)
    }

    fn end_document(&mut self) {
        self.end_document();
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        (*self).finish()
    }
}

impl DocumentWriter for MegatronWriter {
    fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.append(tokens)
    }

    fn end_document(&mut self) {
        self.end_document();
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        (*self).finish()
    }
}

/// The lowest `width` bytes of each token: 1, 2 or 4.
pub(super) fn narrow(tokens: &[u32], width: usize) -> Vec<u8> {
    let mut bytes = vec![0; tokens.len() * width];
    match width {
        1 => bytes.iter_mut().zip(tokens).for_each(|(byte, &token)| *byte = token as u8),
        2 => fill(bytes.as_chunks_mut().0, tokens, |token| (token as u16).to_le_bytes()),
        _ => fill(bytes.as_chunks_mut().0, tokens, u32::to_le_bytes),
    }
    bytes
}

fn fill<const WIDTH: usize>(bytes: &mut [[u8; WIDTH]], tokens: &[u32], narrow: impl Fn(u32) -> [u8; WIDTH]) {
    for (bytes, &token) in bytes.iter_mut().zip(tokens) {
        *bytes = narrow(token);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MegatronFile, TokenFile};
    use super::*;

    #[test]
    fn both_formats_hold_the_same_documents() {
        let folder = tempfile::tempdir().unwrap();
        let (path, prefix) = (folder.path().join("tokens"), folder.path().join("megatron"));
        let writers: [Box<dyn DocumentWriter>; 2] = [
            Box::new(TokenFileWriter::create(&path, 300).unwrap()),
            Box::new(MegatronWriter::create(&prefix, 300).unwrap()),
        ];
        for mut writer in writers {
            writer.document(&[1, 299]).unwrap();
            writer.end_document();
            writer.append(&[3]).unwrap();
            writer.append(&[4, 5]).unwrap();
            assert!(writer.append(&[300]).is_err());
            writer.end_document();
            writer.finish().unwrap();
        }
        let (tokens, megatron) = (TokenFile::open(&path).unwrap(), MegatronFile::open(&prefix).unwrap());
        let wanted = [0..2, 2..2, 2..5];
        for (i, wanted) in (0..3).zip(wanted) {
            assert_eq!(tokens.document(i).unwrap(), wanted);
            assert_eq!(megatron.document(i).unwrap(), wanted);
        }
        assert_eq!((tokens.documents(), megatron.documents()), (3, 3));
        assert_eq!(tokens.tokens(0..5).unwrap(), [1, 299, 3, 4, 5]);
        assert_eq!(megatron.tokens(0..5).unwrap(), [1, 299, 3, 4, 5]);
    }

    #[test]
    fn a_document_that_was_not_ended_is_not_lost_silently() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 300).unwrap();
        writer.append(&[1]).unwrap();
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.ends_with("tokens: the last document was not ended"), "{error}");
    }
}
