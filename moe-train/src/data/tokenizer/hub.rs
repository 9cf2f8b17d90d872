//! Tokenizers of the Hugging Face hub.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{DataError, TokenizeError};
use crate::durable::Context;

/// A `tokenizer.json` of the Hugging Face hub.
#[derive(Clone)]
pub struct HubTokenizer {
    path: PathBuf,
    vocab_size: u32,
    inner: Arc<tokenizers::Tokenizer>,
}

impl HubTokenizer {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read, or is no tokenizer.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let bytes = fs::read(path).context("read", path)?;
        let refuse = |what: String| DataError::Tokenizer { path: path.to_owned(), what };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| refuse(error.to_string()))?;
        // A file may carry the settings of somebody's last batch; documents are never cut nor filled.
        inner.with_truncation(None).map_err(|error| refuse(error.to_string()))?;
        inner.with_padding(None);
        // Numbers may have gaps, so that there are fewer tokens than rows are needed.
        let last = inner.get_vocab(true).into_values().max();
        let vocab_size = last.map_or(Some(0), |last| last.checked_add(1));
        let vocab_size =
            vocab_size.filter(|&size| size > 0).ok_or_else(|| refuse("no vocabulary".to_owned()))?;
        Ok(HubTokenizer { path: path.to_owned(), vocab_size, inner: Arc::new(inner) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(super) fn encode(&self, text: &[u8], add_special_tokens: bool) -> Result<Vec<u32>, TokenizeError> {
        let text =
            std::str::from_utf8(text).map_err(|error| TokenizeError::Utf8 { at: error.valid_up_to() })?;
        // The same as `encode`, but for offsets into the text, which nobody asks for.
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|error| TokenizeError::Refused(error.to_string()))?.get_ids().to_vec())
    }

    pub(super) fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, TokenizeError> {
        let text = self.inner.decode(tokens, skip_special_tokens);
        text.map_err(|error| TokenizeError::Refused(error.to_string()))
    }
}

impl fmt::Debug for HubTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubTokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::{EosToken, Tokenizer, TokenizerKind};
    use super::*;

    const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");

    #[derive(Deserialize)]
    struct Expected {
        vocab_size: u32,
        cases: Vec<Case>,
    }

    /// A text and what the Python package makes of it.
    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        plain: Vec<u32>,
        decoded: String,
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::open(&TokenizerKind::File(FOLDER.into())).unwrap()
    }

    #[test]
    fn ids_and_texts_are_those_of_the_python_package() {
        let tokenizer = tokenizer();
        let expected = fs::read(Path::new(FOLDER).join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_slice(&expected).unwrap();
        assert_eq!(tokenizer.vocab_size(), expected.vocab_size);
        // More than the eight tokens that the file would cut to.
        assert!(expected.cases.iter().any(|case| case.ids.len() > 8));
        for Case { text, ids, plain, decoded } in expected.cases {
            assert_eq!(tokenizer.encode(text.as_bytes(), true).unwrap(), ids, "{text:?}");
            assert_eq!(tokenizer.encode(text.as_bytes(), false).unwrap(), plain, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), decoded);
            for skip_special_tokens in [false, true] {
                let mut stream = tokenizer.stream(skip_special_tokens);
                let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
                let whole = tokenizer.decode(&ids, skip_special_tokens).unwrap();
                assert_eq!(pieces + &stream.finish().unwrap(), whole);
            }
        }
    }

    #[test]
    fn text_must_be_utf8() {
        let error = tokenizer().encode(b"ab\xFFc", false).unwrap_err();
        assert_eq!(error, TokenizeError::Utf8 { at: 2 });
    }

    #[test]
    fn the_end_is_chosen_configured_or_the_only_usual_one() {
        let end = |chosen: &str| tokenizer().eos_token(Some(&chosen.parse().unwrap()));
        assert_eq!(tokenizer().eos_token(None).unwrap().unwrap().to_string(), "<|endoftext|> (1)");
        assert_eq!(end("380").unwrap().unwrap().token, "<|pad|>");
        assert_eq!(end("<|pad|>").unwrap().unwrap().id, 380);
        assert_eq!(end("none").unwrap(), None);
        assert!(end("382").unwrap_err().to_string().contains("has no token 382"));
        assert!(end("</s>").unwrap_err().to_string().contains("has no token \"</s>\""));

        let folder = tempfile::tempdir().unwrap();
        let copied = |from: &str, to: &str, config: Option<&str>| {
            let text = fs::read_to_string(Path::new(FOLDER).join("tokenizer.json")).unwrap();
            fs::write(folder.path().join("tokenizer.json"), text.replace(from, to)).unwrap();
            if let Some(config) = config {
                fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
            }
            Tokenizer::open(&TokenizerKind::File(folder.path().into())).unwrap()
        };
        assert_eq!(copied("", "", None).eos_token(None).unwrap().unwrap().id, 1);
        let error = copied("<|endoftext|>", "<|fin|>", None).eos_token(None).unwrap_err().to_string();
        assert!(error.contains("has none of the usual ones"), "{error}");
        let error = copied("<|pad|>", "</s>", None).eos_token(None).unwrap_err().to_string();
        assert!(error.contains("has several: <|endoftext|>, </s>"), "{error}");
        let added = copied("", "", Some("{\"eos_token\": {\"content\": \"<|pad|>\", \"lstrip\": false}}"));
        assert_eq!(added.eos_token(None).unwrap().unwrap().id, 380);
        assert_eq!(added.eos_token(Some(&EosToken::Id(1))).unwrap().unwrap().token, "<|endoftext|>");
    }

    #[test]
    fn what_is_no_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let open = || Tokenizer::open(&TokenizerKind::File(path.clone())).unwrap_err().to_string();
        assert!(open().contains("tokenizer.json"));
        for text in ["", "{}", "[1]", "{\"model\": {\"type\": \"BPE\", \"vocab\": {}, \"merges\": []}}"] {
            fs::write(&path, text).unwrap();
            assert!(open().contains("tokenizer.json is no tokenizer"), "{text}: {}", open());
        }
    }
}
