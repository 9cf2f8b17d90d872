//! A token file as samples.

use std::ops::Range;

use super::{DataError, TokenFile};

/// Sample `i` is the tokens `iS ..= iS + S` of a file: inputs the first `S`, targets the last `S`. There are
/// `n = ⌊(tokens − 1)/S⌋`; a tail is unused.
#[derive(Debug)]
pub struct Dataset {
    file: TokenFile,
    sequence_length: usize,
    len: u64,
}

impl Dataset {
    /// Samples of `sequence_length` tokens, S, at least 1.
    ///
    /// # Errors
    /// The file has no sample.
    pub fn new(file: TokenFile, sequence_length: usize) -> Result<Self, DataError> {
        let len = file.len().saturating_sub(1).checked_div(sequence_length as u64).unwrap_or(0);
        if len == 0 {
            let (path, tokens) = (file.path().to_owned(), file.len());
            return Err(DataError::TooShort { path, tokens, sequence_length });
        }
        Ok(Dataset { file, sequence_length, len })
    }

    /// The number of samples, n.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Tokens of a sequence, S.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The file behind it.
    pub fn file(&self) -> &TokenFile {
        &self.file
    }

    /// The `S + 1` tokens of sample `i`, below [`len`](Self::len).
    ///
    /// # Errors
    /// `i` is too large.
    pub fn sample(&self, i: u64) -> Result<Vec<u32>, DataError> {
        self.file.tokens(self.range(i))
    }

    /// Positions in sample `i`, from 1 to S, at which a document starts; [`len`](Self::len) is above `i`.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn document_starts(&self, i: u64) -> Result<Vec<usize>, DataError> {
        let range = self.range(i);
        let first = range.start;
        Ok(self.file.document_starts(range)?.into_iter().map(|start| (start - first) as usize).collect())
    }

    /// The tokens of sample `i`.
    fn range(&self, i: u64) -> Range<u64> {
        let s = self.sequence_length as u64;
        let start = i.saturating_mul(s);
        start..start.saturating_add(s + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::TokenFileWriter;
    use super::*;

    fn file_of(tokens: u32) -> (tempfile::TempDir, TokenFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 300).unwrap();
        writer.document(&(0..tokens).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        let file = TokenFile::open(&path).unwrap();
        (folder, file)
    }

    #[test]
    fn samples_overlap_by_one_token_and_a_tail_is_unused() {
        // (tokens − 1)/S exactly whole, one short of it, and more.
        for (tokens, len) in [(9, 2), (10, 2), (12, 2), (13, 3), (5, 1)] {
            let (_folder, file) = file_of(tokens);
            let dataset = Dataset::new(file, 4).unwrap();
            assert_eq!(dataset.len(), len, "{tokens}");
            assert_eq!(
                dataset.sample(len - 1).unwrap(),
                ((len as u32 - 1) * 4..=len as u32 * 4).collect::<Vec<_>>()
            );
            // Only where the tail is as long as a sample would a further one exist.
            assert!(dataset.sample(len).is_err());
            assert!(dataset.sample(u64::MAX).is_err());
        }
    }

    #[test]
    fn documents_start_where_they_were_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 256).unwrap();
        // Of one token, of none, longer than two samples; and one that starts with a sample, and one with its last target.
        for len in [1, 0, 1, 9, 1, 0, 0, 4, 3] {
            writer.document(&vec![7; len]).unwrap();
        }
        writer.finish().unwrap();
        let dataset = Dataset::new(TokenFile::open(&path).unwrap(), 4).unwrap();
        let starts: Vec<_> = (0..dataset.len()).map(|i| dataset.document_starts(i).unwrap()).collect();
        // Documents start at 0, 1, 1, 2, 11, 12, 12, 12, 16.
        assert_eq!(starts, [vec![1, 2], vec![], vec![3, 4], vec![4]]);
    }

    #[test]
    fn a_file_without_a_sample_is_refused_by_name() {
        let (_folder, file) = file_of(4);
        let error = Dataset::new(file, 4).unwrap_err().to_string();
        assert!(error.contains("tokens has 4 tokens, but one sequence needs 5"), "{error}");
    }
}
