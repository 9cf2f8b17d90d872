//! Documents of text files.

use std::fs::File;

use super::super::cut::{document_end, read_at};
use super::super::{DataError, TokenizeError};
use super::input::Input;
use super::plan::Segment;
use super::source::Source;
use crate::durable::Context;

/// Whole documents of a text.
pub(super) struct TextFile<'a> {
    input: &'a Input,
    file: File,
    /// Where the document starts that was read last.
    start: u64,
    /// Where it ends.
    at: u64,
    end: u64,
    /// Whether the file has no byte, and its one empty document was not given yet.
    empty: bool,
}

impl<'a> TextFile<'a> {
    pub fn open(input: &'a Input, segment: &Segment) -> Result<Self, DataError> {
        let file = File::open(&input.path).context("open", &input.path)?;
        let (at, end) = (segment.span.start, segment.span.end);
        Ok(TextFile { input, file, start: at, at, end, empty: input.bytes == 0 })
    }
}

impl Source for TextFile<'_> {
    fn next(&mut self, text: &mut Vec<u8>) -> Result<Option<u64>, DataError> {
        text.clear();
        if std::mem::take(&mut self.empty) {
            return Ok(Some(0));
        }
        if self.at >= self.end {
            return Ok(None);
        }
        let Input { path, bytes, .. } = self.input;
        self.start = self.at;
        self.at = document_end(&mut self.file, path, self.start, *bytes)?;
        text.resize((self.at - self.start) as usize, 0);
        read_at(&mut self.file, path, self.start, text)?;
        Ok(Some(self.at - self.start))
    }

    fn refuse(&self, error: TokenizeError) -> DataError {
        let source = match error {
            TokenizeError::Utf8 { at } => TokenizeError::Utf8 { at: self.start as usize + at },
            other => other,
        };
        DataError::Tokenize { path: self.input.path.clone(), source }
    }
}
