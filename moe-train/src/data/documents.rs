//! Some of the documents of a file.

use std::ops::Range;
use std::sync::Arc;

use super::{DataError, Tokens};

/// Consecutive documents of a file of tokens.
#[derive(Debug, Clone)]
pub struct Documents {
    tokens: Arc<Tokens>,
    documents: Range<u64>,
    span: Range<u64>,
}

impl Documents {
    /// Of n documents, the last `share`·n, rounded, but at least one and not all, behind the others, as Megatron's `--split`
    /// cuts them.
    ///
    /// # Errors
    /// There are not two documents, or they are not where they are said to be.
    pub fn split(tokens: Tokens, share: f64) -> Result<[Self; 2], DataError> {
        let n = tokens.documents();
        if n < 2 {
            return Err(DataError::NoSplit { path: tokens.path().to_owned(), documents: n });
        }
        let first = n - ((share * n as f64).round() as u64).clamp(1, n - 1);
        let (cut, end, tokens) = (tokens.document(first)?.start, tokens.len(), Arc::new(tokens));
        let part = |documents, span| Documents { tokens: tokens.clone(), documents, span };
        Ok([part(0..first, 0..cut), part(first..n, cut..end)])
    }

    /// What they are of.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Which of the documents.
    pub fn documents(&self) -> Range<u64> {
        self.documents.clone()
    }

    /// Which of the tokens.
    pub fn span(&self) -> Range<u64> {
        self.span.clone()
    }
}

/// All of them.
impl From<Tokens> for Documents {
    fn from(tokens: Tokens) -> Self {
        Documents { documents: 0..tokens.documents(), span: 0..tokens.len(), tokens: Arc::new(tokens) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dataset, MegatronWriter, TokenFileWriter};
    use super::*;

    /// Documents of 1, 2, …, n tokens, each its own length.
    fn open(n: u32, megatron: bool) -> (tempfile::TempDir, Tokens) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let mut writer: Box<dyn super::super::DocumentWriter> = match megatron {
            true => Box::new(MegatronWriter::create(&path, 300).unwrap()),
            false => Box::new(TokenFileWriter::create(&path, 300).unwrap()),
        };
        for len in 1..=n {
            writer.document(&vec![len; len as usize]).unwrap();
        }
        writer.finish().unwrap();
        let tokens = Tokens::open(&path).unwrap();
        (folder, tokens)
    }

    #[test]
    fn the_last_documents_are_split_off() {
        for (share, held) in [(0.2, 2), (0.04, 1), (0.25, 3), (0.999, 9)] {
            let (_folder, tokens) = open(10, true);
            let [train, last] = Documents::split(tokens, share).unwrap();
            assert_eq!((train.documents(), last.documents()), (0..10 - held, 10 - held..10), "{share}");
            let cut = (10 - held) * (11 - held) / 2;
            assert_eq!((train.span(), last.span()), (0..cut, cut..55));
        }
        let error = Documents::split(open(1, false).1, 0.5).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "tokens has 1 documents, of which none can be held out: name other tokens in data.validation"
            ),
            "{error}"
        );
    }

    #[test]
    fn samples_of_one_part_have_nothing_of_the_other() {
        for megatron in [false, true] {
            let split = || Documents::split(open(10, megatron).1, 0.2).unwrap();
            // Documents of 9 and 10 tokens behind 36 others.
            let [train, last] = split().map(|part| Dataset::new(part, 300, 5).unwrap());
            assert_eq!((train.len(), last.len()), (7, 3));
            assert!((0..7).all(|i| train.sample(i).unwrap().iter().all(|&token| token <= 8)));
            assert_eq!(last.sample(1).unwrap(), [9, 9, 9, 9, 10, 10]);
            assert_eq!(last.document_starts(1).unwrap(), [4]);
            assert_eq!(last.mask(2).unwrap(), [true; 6]);
            let error = train.sample(7).unwrap_err().to_string();
            assert!(error.ends_with("tokens: there is no sample 7 of 7"), "{error}");
            assert!(train.mask(7).is_err() && train.document_starts(u64::MAX).is_err());

            let [train, last] = split().map(|part| Dataset::packed(part, 300, 10).unwrap());
            // Up to 11 tokens: documents 1 to 4, 5 and 6, 7, 8; and 9, 10.
            assert_eq!((train.len(), last.len()), (4, 2));
            assert_eq!(train.sample(3).unwrap(), [8; 8]);
            assert_eq!(last.sample(0).unwrap(), [9; 9]);
            assert!(train.sample(4).is_err());
        }
    }
}
