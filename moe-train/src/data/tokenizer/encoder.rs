//! Documents as tokens.

use super::{DataError, EosToken, EosTokenId, TokenizeError, Tokenizer, TokenizerKind};

/// How documents become tokens: as transformers' `tokenizer(text)`, special tokens of its template included, and then the
/// token that ends a document, where that is not its last one already.
#[derive(Debug, Clone)]
pub struct Encoder {
    tokenizer: Tokenizer,
    eos: Option<EosTokenId>,
}

impl Encoder {
    /// With the tokenizer and the end that a configuration names.
    ///
    /// # Errors
    /// Those of [`Tokenizer::open`] and [`Tokenizer::eos_token`].
    pub fn open(kind: &TokenizerKind, eos: Option<&EosToken>) -> Result<Self, DataError> {
        let tokenizer = Tokenizer::open(kind)?;
        let eos = tokenizer.eos_token(eos)?;
        Ok(Encoder { tokenizer, eos })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The token that ends documents.
    pub fn eos(&self) -> Option<&EosTokenId> {
        self.eos.as_ref()
    }

    /// All tokens are below this.
    pub fn vocab_size(&self) -> u32 {
        self.tokenizer.vocab_size()
    }

    /// The tokens of a document.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn document(&self, text: &[u8]) -> Result<Vec<u32>, TokenizeError> {
        let mut tokens = self.tokenizer.encode(text, true)?;
        self.end(&mut tokens);
        Ok(tokens)
    }

    /// The tokens of a prompt and of its completion, which ends the document. Each is tokenised by itself, and special tokens of
    /// the template stand with the prompt.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn completion(&self, prompt: &str, completion: &str) -> Result<[Vec<u32>; 2], TokenizeError> {
        let prompt = self.tokenizer.encode(prompt.as_bytes(), true)?;
        let mut completion = self.tokenizer.encode(completion.as_bytes(), false)?;
        self.end(&mut completion);
        Ok([prompt, completion])
    }

    fn end(&self, tokens: &mut Vec<u32>) {
        if let Some(EosTokenId { id, .. }) = self.eos
            && tokens.last() != Some(&id)
        {
            tokens.push(id);
        }
    }
}

#[cfg(all(test, feature = "tokenizers"))]
mod tests {
    use super::*;

    #[test]
    fn documents_begin_as_the_template_says_and_end_once() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");
        let kind = TokenizerKind::File(folder.into());
        let encoder = Encoder::open(&kind, None).unwrap();
        assert_eq!(encoder.document(b"The ranks").unwrap(), [0, 301, 271, 1]);
        assert_eq!(encoder.document(b"The ranks<|endoftext|>").unwrap(), [0, 301, 271, 1]);
        assert_eq!(encoder.document(b"").unwrap(), [0, 1]);
        assert_eq!(encoder.completion("The", " ranks").unwrap(), [vec![0, 301], vec![271, 1]]);
        let without = Encoder::open(&kind, Some(&"none".parse().unwrap())).unwrap();
        assert_eq!(without.document(b"The ranks").unwrap(), [0, 301, 271]);
    }
}
