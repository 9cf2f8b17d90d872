//! Text as tokens.

mod encoder;
mod end;
#[cfg(feature = "tokenizers")]
mod hub;
mod stream;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use encoder::Encoder;
pub use end::{EosToken, EosTokenId};
pub use stream::TextStream;

use super::DataError;
use crate::durable::Context;

/// How text becomes tokens, as it is written in a configuration: `"byte"`, or a path.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum TokenizerKind {
    /// Each byte is a token.
    #[default]
    Byte,
    /// A `tokenizer.json` of the Hugging Face hub, or a folder that has one.
    File(PathBuf),
}

impl From<PathBuf> for TokenizerKind {
    fn from(path: PathBuf) -> Self {
        match path.as_os_str() == "byte" {
            true => TokenizerKind::Byte,
            false => TokenizerKind::File(path),
        }
    }
}

impl From<TokenizerKind> for PathBuf {
    fn from(kind: TokenizerKind) -> Self {
        match kind {
            TokenizerKind::Byte => PathBuf::from("byte"),
            TokenizerKind::File(path) => path,
        }
    }
}

/// Turns text into tokens and back. Clones share what is large.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// Each byte is a token; any bytes are text.
    Byte,
    /// A `tokenizer.json` of the Hugging Face hub.
    #[cfg(feature = "tokenizers")]
    Hub(HubTokenizer),
}

#[cfg(feature = "tokenizers")]
pub use hub::HubTokenizer;

/// Why a text has no tokens, or tokens no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizeError {
    /// The text is not in UTF-8.
    #[error("no UTF-8 at byte {at}")]
    Utf8 {
        /// The first byte that is not, from 0.
        at: usize,
    },
    /// The tokenizer refused.
    #[error("the tokenizer refuses: {0}")]
    Refused(String),
}

#[cfg_attr(
    not(feature = "tokenizers"),
    expect(unused_variables, reason = "bytes have no names and no special tokens")
)]
impl Tokenizer {
    /// The file in a folder of the hub.
    pub const FILE: &str = "tokenizer.json";
    /// The file beside it, which names the token that ends a text.
    pub const CONFIG_FILE: &str = "tokenizer_config.json";

    /// Opens what a configuration names.
    ///
    /// # Errors
    /// The file cannot be read, is no tokenizer, or this program was built without the feature `tokenizers`.
    pub fn open(kind: &TokenizerKind) -> Result<Self, DataError> {
        match kind {
            TokenizerKind::Byte => Ok(Tokenizer::Byte),
            TokenizerKind::File(path) if path.is_dir() => Self::open_file(&path.join(Self::FILE)),
            TokenizerKind::File(path) => Self::open_file(path),
        }
    }

    #[cfg(feature = "tokenizers")]
    fn open_file(path: &Path) -> Result<Self, DataError> {
        HubTokenizer::open(path).map(Tokenizer::Hub)
    }

    #[cfg(not(feature = "tokenizers"))]
    fn open_file(path: &Path) -> Result<Self, DataError> {
        Err(DataError::Feature { path: path.to_owned(), feature: "tokenizers" })
    }

    /// The tokens of a text. `add_special_tokens` is that of transformers: whether what the tokenizer's template puts
    /// around a text is added, such as a token that begins it.
    ///
    /// # Errors
    /// The text is not in UTF-8, unless bytes are tokens.
    pub fn encode(&self, text: &[u8], add_special_tokens: bool) -> Result<Vec<u32>, TokenizeError> {
        match self {
            // Bytes have no template.
            Tokenizer::Byte => Ok(text.iter().map(|&byte| u32::from(byte)).collect()),
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => hub.encode(text, add_special_tokens),
        }
    }

    /// The text of tokens, special ones written out unless they are to be skipped. Bytes that are no UTF-8 become `U+FFFD`,
    /// as do tokens that are no byte where bytes are tokens; tokens that a `tokenizer.json` does not have (a model may have
    /// more rows) have no text, as in transformers.
    ///
    /// # Errors
    /// The tokenizer refuses.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, TokenizeError> {
        match self {
            Tokenizer::Byte => {
                // 0xFF never occurs in UTF-8.
                let bytes: Vec<u8> =
                    tokens.iter().map(|&token| u8::try_from(token).unwrap_or(0xFF)).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => hub.decode(tokens, skip_special_tokens),
        }
    }

    /// Decodes tokens as they come.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream<'_> {
        TextStream::new(self, skip_special_tokens)
    }

    /// All tokens are below this, those included that were added to the vocabulary.
    pub fn vocab_size(&self) -> u32 {
        match self {
            Tokenizer::Byte => 256,
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => hub.vocab_size(),
        }
    }

    /// The number of a token as it is written in the vocabulary; bytes have no names.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Tokenizer::Byte => None,
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => hub.token_to_id(token),
        }
    }

    /// A token as it is written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Tokenizer::Byte => None,
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => hub.id_to_token(id),
        }
    }

    /// The file; none where bytes are tokens.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Tokenizer::Byte => None,
            #[cfg(feature = "tokenizers")]
            Tokenizer::Hub(hub) => Some(hub.path()),
        }
    }

    /// Copies its file, and that beside it, to `folder`, which is made if there are any.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn copy_to(&self, folder: &Path) -> Result<(), DataError> {
        let Some(path) = self.path() else { return Ok(()) };
        fs::create_dir_all(folder).context("create", folder)?;
        let files =
            [(path.to_owned(), Self::FILE), (path.with_file_name(Self::CONFIG_FILE), Self::CONFIG_FILE)];
        for (from, name) in files.into_iter().filter(|(from, _)| from.is_file()) {
            let bytes = fs::read(&from).context("read", &from)?;
            crate::durable::replace(&folder.join(name), &bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip() {
        let text = "für 3 €\n";
        let tokens = Tokenizer::Byte.encode(text.as_bytes(), true).unwrap();
        assert_eq!(tokens.len(), text.len());
        assert_eq!(tokens[1], 0xC3);
        assert_eq!(Tokenizer::Byte.decode(&tokens, false).unwrap(), text);
    }

    #[test]
    fn what_is_no_text_is_marked() {
        assert_eq!(Tokenizer::Byte.decode(&[65, 0xC3, 66], false).unwrap(), "A\u{FFFD}B");
        assert_eq!(Tokenizer::Byte.decode(&[65, 256, 66], false).unwrap(), "A\u{FFFD}B");
    }

    #[test]
    fn a_kind_is_written_as_it_is_read() {
        for text in ["\"byte\"", "\"some/tokenizer.json\""] {
            let kind: TokenizerKind = serde_json::from_str(text).unwrap();
            assert_eq!(kind == TokenizerKind::Byte, text == "\"byte\"");
            assert_eq!(serde_json::to_string(&kind).unwrap(), text);
        }
    }
}
