//! From text files to token files.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::cut::{document_end, read_at};
use super::{DataError, Encoder, TokenFileWriter, TokenizeError};
use crate::durable::Context;

/// What [`prepare`] wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Documents to train on.
    pub train_documents: usize,
    /// Their tokens.
    pub train_tokens: u64,
    /// Held-out documents.
    pub held_out_documents: usize,
    /// Their tokens.
    pub held_out_tokens: u64,
}

impl Prepared {
    /// Counts a document.
    pub(super) fn count(&mut self, is_held_out: bool, tokens: usize) {
        let (documents, sum) = match is_held_out {
            true => (&mut self.held_out_documents, &mut self.held_out_tokens),
            false => (&mut self.train_documents, &mut self.train_tokens),
        };
        *documents += 1;
        *sum += tokens as u64;
    }
}

/// The files that match any of the patterns, sorted by path, each once. Folders that match are passed over.
///
/// # Errors
/// A pattern is malformed or matches no file, or a folder cannot be read.
pub fn find_files(patterns: &[String]) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for pattern in patterns {
        let malformed = |error: glob::PatternError| DataError::Pattern {
            pattern: pattern.clone(),
            message: error.to_string(),
        };
        let before = files.len();
        for path in glob::glob(pattern).map_err(malformed)? {
            let path = path.map_err(|error| {
                let path = error.path().to_owned();
                crate::durable::IoError { action: "read", path, source: error.into() }
            })?;
            if fs::metadata(&path).context("read", &path)?.is_file() {
                files.push(path);
            }
        }
        if files.len() == before {
            let folder = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
            return Err(DataError::NoMatch { pattern: pattern.clone(), folder });
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// Tokenises `files` in the order given and writes two token files. Of n documents, `held_out`·n, rounded, but at least
/// one and not all, are held out: those with the smallest hash of (seed, document index).
///
/// # Errors
/// A file is empty or cannot be read, there is only one document, or a token file cannot be written.
pub fn prepare(
    files: &[PathBuf],
    encoder: &Encoder,
    held_out: f64,
    seed: u64,
    train_path: &Path,
    held_out_path: &Path,
) -> Result<Prepared, DataError> {
    let mut documents = Vec::new();
    for path in files {
        cut(path, &mut documents)?;
    }
    let is_held_out = choose(documents.len(), held_out, seed).ok_or_else(|| DataError::OneDocument {
        bytes: documents.iter().map(|document| document.len as u64).sum(),
    })?;

    let mut train = TokenFileWriter::create(train_path, encoder.vocab_size())?;
    let mut held = TokenFileWriter::create(held_out_path, encoder.vocab_size())?;
    let mut prepared = Prepared::default();
    for (document, is_held_out) in documents.iter().zip(is_held_out) {
        let tokens = encoder.document(&document.read()?).map_err(|error| document.refuse(error))?;
        let writer = if is_held_out { &mut held } else { &mut train };
        writer.document(&tokens)?;
        prepared.count(is_held_out, tokens.len());
    }
    train.finish()?;
    held.finish()?;
    Ok(prepared)
}

/// A part of a file.
#[derive(Debug, PartialEq)]
struct Document<'a> {
    path: &'a Path,
    start: u64,
    len: usize,
}

impl Document<'_> {
    fn read(&self) -> Result<Vec<u8>, DataError> {
        let mut bytes = vec![0; self.len];
        let mut file = File::open(self.path).context("open", self.path)?;
        read_at(&mut file, self.path, self.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Says where in the file the tokenizer found fault.
    fn refuse(&self, error: TokenizeError) -> DataError {
        let source = match error {
            TokenizeError::Utf8 { at } => TokenizeError::Utf8 { at: self.start as usize + at },
            other => other,
        };
        DataError::Tokenize { path: self.path.to_owned(), source }
    }
}

/// Cuts a file into documents.
fn cut<'a>(path: &'a Path, documents: &mut Vec<Document<'a>>) -> Result<(), DataError> {
    let mut file = File::open(path).context("open", path)?;
    let bytes = file.metadata().context("read", path)?.len();
    if bytes == 0 {
        return Err(DataError::EmptyText { path: path.to_owned() });
    }
    let mut start = 0;
    while start < bytes {
        let end = document_end(&mut file, path, start, bytes)?;
        documents.push(Document { path, start, len: (end - start) as usize });
        start = end;
    }
    Ok(())
}

/// Which of `n` documents are held out; none if there are not two.
pub(super) fn choose(n: usize, held_out: f64, seed: u64) -> Option<Vec<bool>> {
    if n < 2 {
        return None;
    }
    let hash = |index: usize| {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update(b"moe-train held out")
            .update(&seed.to_le_bytes())
            .update(&(index as u64).to_le_bytes());
        *hasher.finalize().as_bytes()
    };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_cached_key(|&index| hash(index));
    let count = ((held_out * n as f64).round() as usize).clamp(1, n - 1);
    let mut chosen = vec![false; n];
    for &index in &order[..count] {
        chosen[index] = true;
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_DOCUMENT_BYTES, TokenFile, TokenizerKind};
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn pattern(folder: &tempfile::TempDir, pattern: &str) -> String {
        format!("{}/{pattern}", folder.path().display())
    }

    #[test]
    fn files_are_sorted_and_each_is_taken_once() {
        let folder = folder(&[("b.txt", b"b"), ("a.txt", b"a"), ("sub/c.txt", b"c"), ("d.md", b"d")]);
        let found =
            find_files(&[pattern(&folder, "**/*.txt"), pattern(&folder, "a*"), pattern(&folder, "*")])
                .unwrap();
        let names: Vec<_> =
            found.iter().map(|p| p.strip_prefix(folder.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.txt", "b.txt", "d.md", "sub/c.txt"]);
    }

    #[test]
    fn patterns_that_find_nothing_are_named() {
        let folder = folder(&[("a.txt", b"a"), ("sub/b.txt", b"b")]);
        for nothing in ["*.rs", "su?"] {
            let patterns = [pattern(&folder, "*.txt"), pattern(&folder, nothing)];
            let error = find_files(&patterns).unwrap_err().to_string();
            assert!(error.contains(&format!("{nothing}\" in data.files matches no file")), "{error}");
        }
        assert!(
            find_files(&["***".into()])
                .unwrap_err()
                .to_string()
                .starts_with("pattern \"***\" in data.files: ")
        );
    }

    fn bytes() -> Encoder {
        Encoder::open(&TokenizerKind::Byte, None).unwrap()
    }

    fn run(
        folder: &tempfile::TempDir,
        held_out: f64,
        seed: u64,
    ) -> Result<(Prepared, TokenFile, TokenFile), DataError> {
        let files = find_files(&[pattern(folder, "*.txt")])?;
        let (train, held) = (folder.path().join("train.tokens"), folder.path().join("held_out.tokens"));
        let prepared = prepare(&files, &bytes(), held_out, seed, &train, &held)?;
        Ok((prepared, TokenFile::open(&train)?, TokenFile::open(&held)?))
    }

    #[test]
    fn every_document_is_in_one_part_in_order() {
        let texts: Vec<(String, Vec<u8>)> =
            (0..20).map(|i| (format!("{i:02}.txt"), vec![100 + i as u8; i + 1])).collect();
        let folder = folder(&texts.iter().map(|(n, t)| (n.as_str(), t.as_slice())).collect::<Vec<_>>());
        let (prepared, train, held) = run(&folder, 0.2, 5).unwrap();
        assert_eq!((prepared.train_documents, prepared.held_out_documents), (16, 4));
        assert_eq!((train.documents(), held.documents()), (16, 4));
        assert_eq!(prepared.train_tokens + prepared.held_out_tokens, (1..=20).sum::<u64>());
        let mut seen = Vec::new();
        for file in [&train, &held] {
            file.verify().unwrap();
            let starts: Vec<u32> = (0..file.documents())
                .map(|i| {
                    let tokens = file.tokens(file.document(i).unwrap()).unwrap();
                    assert_eq!(tokens, vec![tokens[0]; tokens[0] as usize - 99]);
                    tokens[0]
                })
                .collect();
            assert!(starts.is_sorted());
            seen.extend(starts);
        }
        seen.sort();
        assert_eq!(seen, (100..120).collect::<Vec<_>>());

        let first = held.tokens(0..held.len()).unwrap();
        let (_, _, again) = run(&folder, 0.2, 5).unwrap();
        assert_eq!(again.tokens(0..again.len()).unwrap(), first);
        let (_, _, other) = run(&folder, 0.2, 6).unwrap();
        assert_ne!(other.tokens(0..other.len()).unwrap(), first);
    }

    #[test]
    fn both_parts_have_a_document_whatever_the_share() {
        let folder = folder(&[("a.txt", b"aa"), ("b.txt", b"bbb"), ("c.txt", b"c")]);
        for (share, held) in [(1e-9, 1), (0.999, 2)] {
            assert_eq!(run(&folder, share, 0).unwrap().0.held_out_documents, held);
        }
    }

    #[test]
    fn a_long_text_is_cut_at_line_ends() {
        let line = b"0123456789012345678901234567890123456789012345678901234567890\n";
        let mut text = line.repeat(2 * MAX_DOCUMENT_BYTES / line.len());
        text.extend(vec![b'x'; MAX_DOCUMENT_BYTES + 7]);
        let folder = folder(&[("long.txt", text.as_slice())]);
        let path = folder.path().join("long.txt");
        let mut documents = Vec::new();
        cut(&path, &mut documents).unwrap();
        let whole = MAX_DOCUMENT_BYTES / line.len() * line.len();
        let lengths: Vec<usize> = documents.iter().map(|d| d.len).collect();
        assert_eq!(lengths[..2], [whole, whole]);
        assert!(lengths.iter().all(|&len| len <= MAX_DOCUMENT_BYTES));
        let joined: Vec<u8> = documents.iter().flat_map(|d| d.read().unwrap()).collect();
        assert_eq!(joined, text);
        run(&folder, 0.1, 0).unwrap();
    }

    #[test]
    fn an_exactly_full_document_is_one() {
        let folder = folder(&[("full.txt", &[b'x'; MAX_DOCUMENT_BYTES])]);
        let path = folder.path().join("full.txt");
        let mut documents = Vec::new();
        cut(&path, &mut documents).unwrap();
        assert_eq!(documents, [Document { path: &path, start: 0, len: MAX_DOCUMENT_BYTES }]);
    }

    #[test]
    fn empty_missing_and_single_documents_are_refused() {
        let folder = folder(&[("a.txt", b"text"), ("empty.txt", b"")]);
        let error = run(&folder, 0.1, 0).unwrap_err().to_string();
        assert!(error.contains("empty.txt is empty"), "{error}");
        fs::remove_file(folder.path().join("empty.txt")).unwrap();
        let error = run(&folder, 0.1, 0).unwrap_err().to_string();
        assert!(error.contains("only one document (4 bytes)"), "{error}");
        assert!(!folder.path().join("train.tokens").exists());
        let missing = folder.path().join("gone");
        let error = prepare(&[missing], &bytes(), 0.1, 0, &folder.path().join("t"), &folder.path().join("h"));
        assert!(error.unwrap_err().to_string().contains("gone"));
        // A file that shrinks between cutting and reading.
        let path = folder.path().join("a.txt");
        assert!(
            Document { path: &path, start: 2, len: 3 }.read().unwrap_err().to_string().contains("changed")
        );
    }

    #[test]
    fn any_bytes_are_text() {
        let folder = folder(&[("a.txt", &[0xFF, 0xFE, 0]), ("b.txt", &[0xC3])]);
        let (prepared, ..) = run(&folder, 0.5, 0).unwrap();
        assert_eq!(prepared.train_tokens + prepared.held_out_tokens, 4);
    }
}
