//! Files of text.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::EvalError;
use crate::Result;
use crate::data::{DataError, InputFormat, Tokenizer, string_field};
use crate::durable::Context;

/// The documents of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// The file.
    pub path: PathBuf,
    /// In the order of the file.
    pub documents: Vec<Document>,
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The bytes of its text. If there are none, nothing of it counts, whatever tokens a tokenizer puts around a text.
    pub bytes: usize,
}

impl Document {
    /// Tokens that are predicted.
    pub(super) fn predicted(&self) -> usize {
        if self.bytes == 0 { 0 } else { self.tokens.len().saturating_sub(1) }
    }
}

impl Text {
    /// Reads a file of text, which is one document; or, if a `field` is named or the file is one of JSON lines by its name, of
    /// JSON objects, one a line, of each of which the string in that field, `text` unless named, is a document. Tokens are
    /// those of transformers' `tokenizer(text)`, special tokens of its template included.
    ///
    /// # Errors
    /// The file cannot be read, a line is no object with such a string, or the tokenizer refuses; the place is named.
    pub fn read(path: &Path, field: Option<&str>, tokenizer: &Tokenizer) -> Result<Self> {
        let field =
            field.or_else(|| matches!(InputFormat::of(path), Ok(InputFormat::Jsonl)).then_some("text"));
        let documents = match field {
            Some(field) => lines(path, field, tokenizer)?,
            None => {
                let text = fs::read(path).context("read", path).map_err(DataError::from)?;
                let tokens = tokenizer
                    .encode(&text, true)
                    .map_err(|source| DataError::Tokenize { path: path.to_owned(), source })?;
                vec![Document { tokens, bytes: text.len() }]
            }
        };
        Ok(Text { path: path.to_owned(), documents })
    }

    /// That there is something to predict for a model of `vocab_size` tokens, and nothing else.
    pub(super) fn check(&self, vocab_size: usize) -> std::result::Result<(), EvalError> {
        let path = || self.path.clone();
        if self.documents.iter().all(|document| document.bytes == 0) {
            return Err(EvalError::Empty { path: path() });
        }
        if self.documents.iter().all(|document| document.predicted() == 0) {
            return Err(EvalError::NothingToPredict { path: path() });
        }
        for (index, document) in self.documents.iter().enumerate() {
            if let Some(&token) = document.tokens.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(EvalError::Vocabulary { path: path(), document: index, token, vocab_size });
            }
        }
        Ok(())
    }
}

/// The documents of a file of JSON objects.
fn lines(path: &Path, field: &str, tokenizer: &Tokenizer) -> Result<Vec<Document>> {
    let mut file = BufReader::new(File::open(path).context("open", path).map_err(DataError::from)?);
    let (mut documents, mut bytes, mut line) = (Vec::new(), Vec::new(), 0);
    while file.read_until(b'\n', &mut bytes).context("read", path).map_err(DataError::from)? > 0 {
        line += 1;
        let document = document(&bytes, field, tokenizer);
        documents.push(document.map_err(|what| DataError::Line { path: path.to_owned(), line, what })?);
        bytes.clear();
    }
    Ok(documents)
}

/// The document of a line.
fn document(line: &[u8], field: &str, tokenizer: &Tokenizer) -> std::result::Result<Document, String> {
    let text = string_field(line, field)?.unwrap_or_default();
    let tokens = tokenizer.encode(text.as_bytes(), true).map_err(|error| error.to_string())?;
    Ok(Document { tokens, bytes: text.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], field: Option<&str>) -> std::result::Result<Vec<Document>, String> {
        read_as("text", text, field)
    }

    fn read_as(name: &str, text: &[u8], field: Option<&str>) -> std::result::Result<Vec<Document>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        Text::read(&path, field, &Tokenizer::Byte)
            .map(|text| text.documents)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_one_document_or_one_a_line() {
        let document =
            |text: &str| Document { tokens: text.bytes().map(u32::from).collect(), bytes: text.len() };
        assert_eq!(read(b"ab\nc", None).unwrap(), [document("ab\nc")]);
        let lines =
            "{\"id\": 3, \"text\": \"a\\u00e9\\n\"}\n{\"text\": \"\", \"more\": {}}\r\n{\"text\": \"é\"}";
        assert_eq!(read(lines.as_bytes(), Some("text")).unwrap(), ["aé\n", "", "é"].map(document));
        assert_eq!(read(b"", Some("text")).unwrap(), []);
        // By its name, too.
        let lines = b"{\"text\": \"a\"}\n{\"text\": null, \"body\": \"b\"}\n";
        assert_eq!(read_as("lines.JSONL", lines, None).unwrap(), ["a", ""].map(document));
        assert!(
            read_as("lines.json", lines, Some("body"))
                .unwrap_err()
                .contains("lines.json:1: missing field `body`")
        );
        assert_eq!(read_as("lines.txt", lines, None).unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_document_is_named_by_its_line() {
        for (bad, what) in [
            (&b"\n"[..], "an empty line"),
            (b"{\"text\": \"a\xFFb\"}", "no UTF-8 at byte 11 of the line"),
            (b"{\"text\": 3}", "invalid type: integer `3`, expected a string (column 10)"),
            (b"{\"id\": 1, \"body\": \"\"}", "missing field `text` (column 21)"),
            (b"[\"text\"]", "invalid type: sequence, expected a JSON object (column 0)"),
            (b"{\"text\": \"a\"", "EOF while parsing an object (column 12)"),
        ] {
            let error = read(&[b"{\"text\": \"x\"}\n", bad].concat(), Some("text")).unwrap_err();
            assert!(error.ends_with(&format!("text:2: {what}")), "{error}");
        }
    }

    #[test]
    fn there_must_be_something_to_predict() {
        let text = |documents: &[(&[u32], usize)]| Text {
            path: "t".into(),
            documents: documents
                .iter()
                .map(|&(tokens, bytes)| Document { tokens: tokens.to_vec(), bytes })
                .collect(),
        };
        let refused = |documents: &[(&[u32], usize)]| text(documents).check(5).unwrap_err();
        assert_eq!(refused(&[]), EvalError::Empty { path: "t".into() });
        assert_eq!(refused(&[(&[0, 1], 0)]), EvalError::Empty { path: "t".into() });
        assert_eq!(refused(&[(&[0, 1], 0), (&[2], 3)]), EvalError::NothingToPredict { path: "t".into() });
        let other = EvalError::Vocabulary { path: "t".into(), document: 1, token: 5, vocab_size: 5 };
        assert_eq!(refused(&[(&[0, 1], 2), (&[5], 1)]), other);
        text(&[(&[0, 4], 2), (&[2], 1)]).check(5).unwrap();
    }
}
