//! Tokens of nanoGPT, llm.c and modded-nanogpt.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::{DataError, DocumentWriter};
use crate::durable::Context;

/// Bytes that are read at a time: a multiple of every width.
const CHUNK: u64 = 1 << 20;
/// Bytes of a header: 256 numbers of 4 bytes, of which the first three mean something.
const HEADER: u64 = 1024;

/// Files with a header, by its first number, its version and the bytes of a token (`dev/data/data_common.py` of llm.c).
const HEADED: [(u32, u32, u64); 2] = [(20_240_520, 1, 2), (20_240_801, 7, 4)];
/// The first number of files of multiple-choice questions, which are no text.
const QUESTIONS: u32 = 20_240_522;

/// What [`import_nanogpt`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Imported {
    /// Documents.
    pub documents: u64,
    /// Their tokens.
    pub tokens: u64,
}

/// Writes the tokens of `files`, one after the other, which are of either kind:
///
/// - nanoGPT's, two bytes a token and nothing else. The token `eot` is the last one of each document.
/// - llm.c's, which modded-nanogpt reads too, with a header of 1024 bytes: two bytes a token for GPT-2, four for Llama 3. The
///   token `eot` is the first one of each document.
///
/// A document may go on in the next file. Without `eot` all files are one document.
///
/// # Errors
/// A file cannot be read or is of another kind or length; [`DocumentWriter::append`] refuses a token. `writer` is not finished
/// then.
pub fn import_nanogpt(
    files: &[PathBuf],
    eot: Option<u32>,
    writer: &mut dyn DocumentWriter,
) -> Result<Imported, DataError> {
    let mut documents = Documents { writer, eot, open: 0, imported: Imported::default() };
    for path in files {
        let mut file = BufReader::with_capacity(1 << 16, File::open(path).context("open", path)?);
        let bytes = file.get_ref().metadata().context("read", path)?.len();
        let kind = Kind::of(path, &mut file, bytes)?;
        let mut left = kind.bytes;
        let mut buffer = Vec::new();
        while left > 0 {
            buffer.clear();
            file.by_ref().take(left.min(CHUNK)).read_to_end(&mut buffer).context("read", path)?;
            if buffer.is_empty() {
                return Err(DataError::Changed { path: path.clone() });
            }
            left -= buffer.len() as u64;
            let tokens: Vec<u32> = match kind.width {
                2 => buffer.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b).into()).collect(),
                _ => buffer.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect(),
            };
            documents.add(&tokens, kind.headed)?;
        }
    }
    documents.end();
    Ok(documents.imported)
}

/// What follows in a file.
struct Kind {
    /// Bytes of a token.
    width: u64,
    /// Bytes of all tokens.
    bytes: u64,
    headed: bool,
}

impl Kind {
    /// Reads the header, if there is one.
    fn of(path: &Path, file: &mut BufReader<File>, bytes: u64) -> Result<Self, DataError> {
        let refuse = |what: String| Err(DataError::NanoGpt { path: path.to_owned(), what });
        let mut start = Vec::new();
        file.by_ref().take(HEADER).read_to_end(&mut start).context("read", path)?;
        let number = |i: usize| start.as_chunks().0.get(i).map(|&bytes| u32::from_le_bytes(bytes));
        let headed = HEADED.into_iter().find(|&(magic, ..)| number(0) == Some(magic));
        let Some((_, version, width)) = headed.filter(|_| start.len() as u64 == HEADER) else {
            if number(0) == Some(QUESTIONS) {
                return refuse("it holds multiple-choice questions of llm.c, no text".to_owned());
            }
            if !bytes.is_multiple_of(2) {
                return refuse(format!("{bytes} bytes, but every token has two"));
            }
            file.seek_relative(-(start.len() as i64)).context("read", path)?;
            return Ok(Kind { width: 2, bytes, headed: false });
        };
        if number(1) != Some(version) {
            let found = number(1).unwrap_or(0);
            return refuse(format!("version {found} of its format, but only version {version} is supported"));
        }
        let (tokens, bytes) = (u64::from(number(2).unwrap_or(0)), bytes - HEADER);
        if tokens * width != bytes {
            return refuse(format!(
                "its header says {tokens} tokens of {width} bytes, but {bytes} bytes follow it: it was cut off or extended"
            ));
        }
        Ok(Kind { width, bytes, headed: true })
    }
}

/// Cuts a stream at the tokens that separate documents.
struct Documents<'a> {
    writer: &'a mut dyn DocumentWriter,
    eot: Option<u32>,
    /// Tokens since the last document's end.
    open: u64,
    imported: Imported,
}

impl Documents<'_> {
    fn add(&mut self, mut tokens: &[u32], eot_first: bool) -> Result<(), DataError> {
        while let Some(at) = tokens.iter().position(|&token| Some(token) == self.eot) {
            let (before, eot) = tokens[..=at].split_at(at);
            tokens = &tokens[at + 1..];
            match eot_first {
                true => {
                    self.append(before)?;
                    self.end();
                    self.append(eot)?;
                }
                false => {
                    self.append(before)?;
                    self.append(eot)?;
                    self.end();
                }
            }
        }
        self.append(tokens)
    }

    fn append(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.writer.append(tokens)?;
        self.open += tokens.len() as u64;
        self.imported.tokens += tokens.len() as u64;
        Ok(())
    }

    /// Ends the document, unless it has no tokens.
    fn end(&mut self) {
        if std::mem::take(&mut self.open) > 0 {
            self.writer.end_document();
            self.imported.documents += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{TokenFile, TokenFileWriter};
    use super::*;

    fn raw(tokens: &[u16]) -> Vec<u8> {
        tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
    }

    fn headed(magic: u32, version: u32, tokens: &[u32], width: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [magic, version, tokens.len() as u32].iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.resize(HEADER as usize, 0);
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes().into_iter().take(width)));
        bytes
    }

    fn import(files: &[Vec<u8>], eot: Option<u32>) -> Result<Vec<Vec<u32>>, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..files.len()).map(|i| folder.path().join(format!("{i}.bin"))).collect();
        for (path, bytes) in paths.iter().zip(files) {
            fs::write(path, bytes).unwrap();
        }
        let out = folder.path().join("out");
        let mut writer = Box::new(TokenFileWriter::create(&out, 100_000).unwrap());
        let imported = import_nanogpt(&paths, eot, &mut *writer)?;
        writer.finish().unwrap();
        let file = TokenFile::open(&out).unwrap();
        assert_eq!(imported, Imported { documents: file.documents(), tokens: file.len() });
        Ok((0..file.documents()).map(|i| file.tokens(file.document(i).unwrap()).unwrap()).collect())
    }

    #[test]
    fn nanogpt_ends_documents_with_the_token() {
        let file = raw(&[1, 2, 50256, 3, 50256, 50256, 4]);
        let documents = import(std::slice::from_ref(&file), Some(50256)).unwrap();
        assert_eq!(documents, [&[1, 2, 50256][..], &[3, 50256], &[50256], &[4]]);
        // The last document goes on in the next file.
        let documents = import(&[file.clone(), raw(&[5, 50256])], Some(50256)).unwrap();
        assert_eq!(documents.last().unwrap(), &[4, 5, 50256]);
        assert_eq!(import(&[file], None).unwrap(), [[1, 2, 50256, 3, 50256, 50256, 4]]);
        assert_eq!(import(&[Vec::new()], None).unwrap(), [[0; 0]; 0]);
    }

    #[test]
    fn a_header_says_that_documents_start_with_the_token() {
        let gpt2 = headed(20_240_520, 1, &[50256, 1, 2, 50256, 3], 2);
        assert_eq!(
            import(std::slice::from_ref(&gpt2), Some(50256)).unwrap(),
            [&[50256, 1, 2][..], &[50256, 3]]
        );
        let next = headed(20_240_520, 1, &[4, 50256, 5], 2);
        let documents = import(&[gpt2, next], Some(50256)).unwrap();
        assert_eq!(documents, [&[50256, 1, 2][..], &[50256, 3, 4], &[50256, 5]]);
        let llama = headed(20_240_801, 7, &[90_000, 99_999], 4);
        assert_eq!(import(&[llama], Some(90_000)).unwrap(), [[90_000, 99_999]]);
    }

    /// More tokens than are read at a time.
    #[test]
    fn chunks_leave_no_trace() {
        let tokens: Vec<u16> = (0..700_000_u32).map(|i| (i % 1009) as u16).collect();
        let documents = import(&[raw(&tokens)], Some(1008)).unwrap();
        assert_eq!(documents.len(), 694);
        assert!(documents[..693].iter().all(|document| document.len() == 1009));
        assert!(documents.concat().iter().zip(tokens).all(|(&read, written)| read == u32::from(written)));
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let good = headed(20_240_520, 1, &[1, 2, 3], 2);
        let refused = |bytes: Vec<u8>, what: &str| {
            let error = import(&[good.clone(), bytes], None).unwrap_err().to_string();
            assert!(error.contains("1.bin: ") && error.contains(what), "{error}");
        };
        refused(vec![1, 2, 3], "3 bytes, but every token has two");
        refused(headed(20_240_520, 2, &[1], 2), "version 2 of its format, but only version 1 is supported");
        refused(headed(20_240_522, 1, &[1], 2), "multiple-choice questions");
        refused(good[..good.len() - 1].to_vec(), "says 3 tokens of 2 bytes, but 5 bytes follow");
        refused([&good[..], &[0, 0]].concat(), "but 8 bytes follow it");
        let error = import(&[headed(20_240_801, 7, &[100_000], 4)], None).unwrap_err().to_string();
        assert_eq!(error, "token 100000 is not below the vocabulary of 100000");
    }
}
