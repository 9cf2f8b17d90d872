//! Tokens as samples.

use std::ops::Range;

use super::{DataError, Documents, Tokens};

/// Samples of at most S inputs, cut from tokens in one of two ways.
///
/// - [A stream](Self::new): sample `i` is the tokens `iS ..= iS + S`, inputs the first `S`, targets the last `S`. There are
///   `n = ⌊(tokens − 1)/S⌋`; a tail is unused.
/// - [Packed](Self::packed): a sample is as many whole documents, in their order, as fit into `S + 1` tokens.
#[derive(Debug)]
pub struct Dataset {
    part: Documents,
    vocab_size: u64,
    sequence_length: usize,
    cut: Cut,
}

#[derive(Debug)]
enum Cut {
    Stream {
        len: u64,
    },
    /// Where samples start, and where the last one ends.
    Packed {
        starts: Vec<u64>,
    },
}

impl Dataset {
    /// A stream of samples of `sequence_length` tokens, S, at least 1, for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// There is no sample, or the tokens are of a larger vocabulary.
    pub fn new(
        part: impl Into<Documents>,
        vocab_size: usize,
        sequence_length: usize,
    ) -> Result<Self, DataError> {
        let part = part.into();
        let vocab_size = check_vocabulary(part.tokens(), vocab_size)?;
        let tokens = part.span().end - part.span().start;
        let len = tokens.saturating_sub(1).checked_div(sequence_length as u64).unwrap_or(0);
        if len == 0 {
            let path = part.tokens().path().to_owned();
            return Err(DataError::TooShort { path, tokens, sequence_length });
        }
        Ok(Dataset { part, vocab_size, sequence_length, cut: Cut::Stream { len } })
    }

    /// Samples of whole documents. 8 bytes of memory for each.
    ///
    /// # Errors
    /// A document is longer than `sequence_length + 1` tokens, or there is none; the tokens are of a larger vocabulary.
    pub fn packed(
        part: impl Into<Documents>,
        vocab_size: usize,
        sequence_length: usize,
    ) -> Result<Self, DataError> {
        let part = part.into();
        let (tokens, most) = (part.tokens(), sequence_length as u64 + 1);
        let vocab_size = check_vocabulary(tokens, vocab_size)?;
        let mut end = part.span().start;
        let mut starts = vec![end];
        for index in part.documents() {
            let document = tokens.document(index)?;
            let len = document.end.saturating_sub(document.start);
            if len > most {
                let path = tokens.path().to_owned();
                return Err(DataError::LongDocument { path, index, tokens: len, sequence_length });
            }
            let first = starts.last().copied().unwrap_or(0);
            if document.end.saturating_sub(first) > most {
                starts.push(document.start);
            }
            end = document.end;
        }
        if end == part.span().start {
            let (path, tokens) = (tokens.path().to_owned(), 0);
            return Err(DataError::TooShort { path, tokens, sequence_length });
        }
        starts.push(end);
        Ok(Dataset { part, vocab_size, sequence_length, cut: Cut::Packed { starts } })
    }

    /// The number of samples, n.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        match &self.cut {
            Cut::Stream { len } => *len,
            Cut::Packed { starts } => starts.len() as u64 - 1,
        }
    }

    /// Tokens of a sequence, S.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// What it is cut from.
    pub fn part(&self) -> &Documents {
        &self.part
    }

    /// The tokens that these are of.
    pub fn tokens(&self) -> &Tokens {
        self.part.tokens()
    }

    /// The tokens of sample `i`, below [`len`](Self::len): `S + 1`, or fewer of a packed one.
    ///
    /// # Errors
    /// `i` is too large, or a token is not in the model's vocabulary.
    pub fn sample(&self, i: u64) -> Result<Vec<u32>, DataError> {
        let range = self.range(i)?;
        let tokens = self.tokens().tokens(range.clone())?;
        match (range.start..).zip(&tokens).find(|&(_, &token)| u64::from(token) >= self.vocab_size) {
            None => Ok(tokens),
            Some((position, &token)) => Err(DataError::ForeignToken {
                path: self.tokens().path().to_owned(),
                position,
                token,
                model_vocab_size: self.vocab_size,
            }),
        }
    }

    /// Which of the tokens of sample `i` the loss counts as targets.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn mask(&self, i: u64) -> Result<Vec<bool>, DataError> {
        self.tokens().mask(self.range(i)?)
    }

    /// Positions in sample `i`, from 1 to S, at which a document starts; [`len`](Self::len) is above `i`.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn document_starts(&self, i: u64) -> Result<Vec<usize>, DataError> {
        let range = self.range(i)?;
        let first = range.start;
        let starts = self.tokens().document_starts(range)?;
        Ok(starts.into_iter().map(|start| start.saturating_sub(first) as usize).collect())
    }

    /// The tokens of sample `i`, as a range of all tokens.
    fn range(&self, i: u64) -> Result<Range<u64>, DataError> {
        if i >= self.len() {
            return Err(DataError::NoSample { path: self.tokens().path().to_owned(), i, len: self.len() });
        }
        Ok(match &self.cut {
            Cut::Stream { .. } => {
                let s = self.sequence_length as u64;
                let start = self.part.span().start + i * s;
                start..start + s + 1
            }
            Cut::Packed { starts } => starts[i as usize]..starts[i as usize + 1],
        })
    }
}

/// The model's vocabulary, if it holds that of the tokens, where that is known.
fn check_vocabulary(tokens: &Tokens, vocab_size: usize) -> Result<u64, DataError> {
    let model_vocab_size = vocab_size as u64;
    match tokens.vocab_size() {
        Some(vocab_size) if vocab_size > model_vocab_size => {
            Err(DataError::LargeVocabulary { path: tokens.path().to_owned(), vocab_size, model_vocab_size })
        }
        _ => Ok(model_vocab_size),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MegatronWriter, TokenFileWriter};
    use super::*;

    fn file_of(tokens: u32) -> (tempfile::TempDir, Tokens) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 300).unwrap();
        writer.document(&(0..tokens).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        let file = Tokens::open(&path).unwrap();
        (folder, file)
    }

    #[test]
    fn samples_overlap_by_one_token_and_a_tail_is_unused() {
        // (tokens − 1)/S exactly whole, one short of it, and more.
        for (tokens, len) in [(9, 2), (10, 2), (12, 2), (13, 3), (5, 1)] {
            let (_folder, file) = file_of(tokens);
            let dataset = Dataset::new(file, 300, 4).unwrap();
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
        let dataset = Dataset::new(Tokens::open(&path).unwrap(), 300, 4).unwrap();
        let starts: Vec<_> = (0..dataset.len()).map(|i| dataset.document_starts(i).unwrap()).collect();
        // Documents start at 0, 1, 1, 2, 11, 12, 12, 12, 16.
        assert_eq!(starts, [vec![1, 2], vec![], vec![3, 4], vec![4]]);
    }

    #[test]
    fn packed_samples_are_whole_documents() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer = TokenFileWriter::create(&path, 256).unwrap();
        for (prompt, completion) in [(1, 2), (1, 1), (2, 3), (1, 4), (3, 1), (1, 1)] {
            writer.completion(&vec![7; prompt], &vec![9; completion]).unwrap();
        }
        writer.finish().unwrap();
        let open = || Tokens::open(&path).unwrap();
        // Documents of 3, 2, 5, 5, 4 and 2 tokens, of which up to 6 fit.
        let dataset = Dataset::packed(open(), 300, 5).unwrap();
        let of = |i| (dataset.sample(i).unwrap(), dataset.document_starts(i).unwrap());
        let samples: Vec<_> = (0..dataset.len()).map(of).collect();
        let want: [(&[u32], &[usize]); 4] = [
            (&[7, 9, 9, 7, 9], &[3]),
            (&[7, 7, 9, 9, 9], &[]),
            (&[7, 9, 9, 9, 9], &[]),
            (&[7, 7, 7, 9, 7, 9], &[4]),
        ];
        assert!(samples.iter().zip(want).all(|((tokens, starts), want)| (&tokens[..], &starts[..]) == want));
        assert_eq!(samples.len(), 4);
        for i in 0..4 {
            let learnt: Vec<bool> = dataset.sample(i).unwrap().iter().map(|&token| token == 9).collect();
            assert_eq!(dataset.mask(i).unwrap(), learnt);
        }
        assert!(dataset.sample(4).is_err() && dataset.mask(u64::MAX).is_err());
        let error = Dataset::packed(open(), 300, 3).unwrap_err().to_string();
        assert!(
            error.ends_with("document 2 has 5 tokens, but a sequence takes at most 4 (sequence_length + 1)"),
            "{error}"
        );
        // As a stream, the same file is masked too.
        assert_eq!(Dataset::new(open(), 300, 4).unwrap().mask(0).unwrap(), [false, true, true, false, true]);
    }

    #[test]
    fn a_file_without_a_sample_is_refused_by_name() {
        let (_folder, file) = file_of(4);
        let error = Dataset::new(file, 300, 4).unwrap_err().to_string();
        assert!(error.contains("tokens has 4 tokens, but one sequence needs 5"), "{error}");
    }

    #[test]
    fn tokens_beyond_the_vocabulary_of_the_model_are_refused() {
        let (_folder, file) = file_of(9);
        let error = Dataset::new(file, 299, 4).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "tokens has a vocabulary of 300 tokens, more than the model's 299 (model.vocab_size)"
            ),
            "{error}"
        );
        // Megatron's format does not say.
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("d");
        let mut writer = MegatronWriter::create(&prefix, 300).unwrap();
        writer.document(&[5, 6, 7]).unwrap();
        writer.document(&[8, 299, 9, 10, 11]).unwrap();
        writer.finish().unwrap();
        let dataset = Dataset::new(Tokens::open(&prefix).unwrap(), 299, 2).unwrap();
        assert_eq!((dataset.len(), dataset.sample(0).unwrap()), (3, vec![5, 6, 7]));
        assert_eq!(
            dataset.sample(2).unwrap_err().to_string().split("d: ").last(),
            Some("token 4 is 299, but the model's vocabulary has 299 (model.vocab_size)")
        );
        let dataset = Dataset::new(Tokens::open(&prefix).unwrap(), 300, 2).unwrap();
        assert_eq!(
            (dataset.sample(1).unwrap(), dataset.document_starts(1).unwrap()),
            (vec![7, 8, 299], vec![1])
        );
    }
}
