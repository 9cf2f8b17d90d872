//! Tokens in documents, in whichever format.

use std::ops::Range;
use std::path::Path;

use super::{DataError, MegatronFile, TokenFile};

/// Tokens that are read at a time.
const CHUNK: u64 = 1 << 18;

/// Tokens in documents, in one of the formats that can be trained on, mapped into memory.
#[derive(Debug)]
pub enum Tokens {
    /// A token file.
    File(TokenFile),
    /// An indexed dataset of Megatron.
    Megatron(MegatronFile),
}

/// What was compared by [`Tokens::verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// Every byte, with the checksums that were written with it.
    Checksums,
    /// That it is what its format demands; there are no checksums.
    StructureOnly,
}

impl Tokens {
    /// Opens a token file, or a dataset of Megatron that is named without `.bin` and `.idx`.
    ///
    /// # Errors
    /// There is neither, or it is damaged.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        if path.is_file() {
            return Ok(Tokens::File(TokenFile::open(path)?));
        }
        match MegatronFile::exists(path) {
            true => Ok(Tokens::Megatron(MegatronFile::open(path)?)),
            false => Err(DataError::NoTokens { path: path.to_owned() }),
        }
    }

    /// Where it is; of Megatron's, the prefix.
    pub fn path(&self) -> &Path {
        match self {
            Tokens::File(file) => file.path(),
            Tokens::Megatron(file) => file.prefix(),
        }
    }

    /// The number of tokens.
    pub fn len(&self) -> u64 {
        match self {
            Tokens::File(file) => file.len(),
            Tokens::Megatron(file) => file.len(),
        }
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All tokens are said to be below this, where the format says so.
    pub fn vocab_size(&self) -> Option<u64> {
        match self {
            Tokens::File(file) => Some(file.vocab_size()),
            Tokens::Megatron(_) => None,
        }
    }

    /// The number of documents.
    pub fn documents(&self) -> u64 {
        match self {
            Tokens::File(file) => file.documents(),
            Tokens::Megatron(file) => file.documents(),
        }
    }

    /// The tokens of document `i`, as a range of all tokens.
    ///
    /// # Errors
    /// There is no such document.
    pub fn document(&self, i: u64) -> Result<Range<u64>, DataError> {
        match self {
            Tokens::File(file) => file.document(i),
            Tokens::Megatron(file) => file.document(i),
        }
    }

    /// Where the documents start that start inside of `range`, counted in tokens, ascending; not that at its start.
    ///
    /// # Errors
    /// The index is damaged.
    pub fn document_starts(&self, range: Range<u64>) -> Result<Vec<u64>, DataError> {
        let (mut low, mut high) = (0, self.documents());
        // The first document that starts after the range does.
        while low < high {
            let middle = low + (high - low) / 2;
            match self.document(middle)?.start <= range.start {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        let mut starts = Vec::new();
        for i in low..self.documents() {
            match self.document(i)?.start {
                start if start >= range.end => break,
                start => starts.push(start),
            }
        }
        // Documents without tokens start where the next one does.
        starts.dedup();
        Ok(starts)
    }

    /// Some of the tokens.
    ///
    /// # Errors
    /// The range reaches beyond the end, or one of them is negative.
    pub fn tokens(&self, range: Range<u64>) -> Result<Vec<u32>, DataError> {
        match self {
            Tokens::File(file) => file.tokens(range),
            Tokens::Megatron(file) => file.tokens(range),
        }
    }

    /// Whether some tokens are not to be learnt.
    pub fn is_masked(&self) -> bool {
        match self {
            Tokens::File(file) => file.is_masked(),
            Tokens::Megatron(_) => false,
        }
    }

    /// Which of some tokens the loss counts as targets; all of them where there is no mask.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn mask(&self, range: Range<u64>) -> Result<Vec<bool>, DataError> {
        match self {
            Tokens::File(file) => file.mask(range),
            Tokens::Megatron(file) => Ok(vec![true; file.tokens(range)?.len()]),
        }
    }

    /// Calls `f` with all tokens, some at a time.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn for_each_chunk(
        &self,
        mut f: impl FnMut(&[u32]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let mut start = 0;
        while start < self.len() {
            let end = self.len().min(start + CHUNK);
            f(&self.tokens(start..end)?)?;
            start = end;
        }
        Ok(())
    }

    /// Reads everything once and compares it with what was written, as far as that is known.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify(&self) -> Result<Verified, DataError> {
        match self {
            Tokens::File(file) => file.verify().map(|()| Verified::Checksums),
            Tokens::Megatron(file) => Ok(match file.verify()? {
                true => Verified::Checksums,
                false => Verified::StructureOnly,
            }),
        }
    }
}

impl From<TokenFile> for Tokens {
    fn from(file: TokenFile) -> Self {
        Tokens::File(file)
    }
}

impl From<MegatronFile> for Tokens {
    fn from(file: MegatronFile) -> Self {
        Tokens::Megatron(file)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MegatronWriter, TokenFileWriter};
    use super::*;

    #[test]
    fn what_a_path_names_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let mut file = TokenFileWriter::create(&path("file"), 300).unwrap();
        file.document(&[1, 2]).unwrap();
        file.finish().unwrap();
        let mut megatron = MegatronWriter::create(&path("megatron"), 300).unwrap();
        megatron.document(&[1, 2]).unwrap();
        megatron.finish().unwrap();

        for (name, vocab_size) in [("file", Some(300)), ("megatron", None)] {
            let tokens = Tokens::open(&path(name)).unwrap();
            assert_eq!((tokens.path(), tokens.vocab_size()), (&*path(name), vocab_size));
            assert_eq!((tokens.len(), tokens.documents(), tokens.is_masked()), (2, 1, false));
            assert_eq!(tokens.mask(0..2).unwrap(), [true; 2]);
            assert!(tokens.mask(1..3).is_err());
            assert_eq!(tokens.verify().unwrap(), Verified::Checksums);
        }
        std::fs::remove_file(path("megatron.blake3.json")).unwrap();
        assert_eq!(Tokens::open(&path("megatron")).unwrap().verify().unwrap(), Verified::StructureOnly);

        // One of the two files, and none.
        let error = Tokens::open(&path("megatron.idx")).unwrap_err().to_string();
        assert!(error.contains("no token file") && error.contains("without .bin and .idx"), "{error}");
        std::fs::remove_file(path("megatron.idx")).unwrap();
        let error = Tokens::open(&path("megatron")).unwrap_err().to_string();
        assert!(
            error.ends_with("megatron: there is no token file of that name, nor a .bin and an .idx"),
            "{error}"
        );
    }
}
