//! The token that ends a document.

use std::fmt;
use std::fs;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{DataError, Tokenizer};
use crate::durable::Context;

/// Which token ends a document, as it is written: a number, a token of the vocabulary, or `"none"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EosToken {
    /// Its number.
    Id(u32),
    /// As the vocabulary has it, or `none`.
    Token(String),
}

impl EosToken {
    const NONE: &str = "none";
}

impl FromStr for EosToken {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.parse().map_or_else(|_| EosToken::Token(text.to_owned()), EosToken::Id))
    }
}

/// The token that ends a document, in the tokenizer's vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EosTokenId {
    /// Its number.
    pub id: u32,
    /// As the vocabulary has it.
    pub token: String,
}

impl fmt::Display for EosTokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.token, self.id)
    }
}

/// Tokens that end a text in vocabularies that are in use.
const KNOWN: [&str; 8] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
];

impl Tokenizer {
    /// The token that ends a document: the one chosen; else `eos_token` of the `tokenizer_config.json` beside the tokenizer;
    /// else the only one of the usual ones that the vocabulary has. None where bytes are tokens, or where `none` is chosen.
    ///
    /// # Errors
    /// The vocabulary has no such token; there is none or several of the usual ones to choose from; the file is malformed.
    pub fn eos_token(&self, chosen: Option<&EosToken>) -> Result<Option<EosTokenId>, DataError> {
        let refuse = |what: String| DataError::EosToken { what };
        match chosen {
            Some(EosToken::Token(none)) if none == EosToken::NONE => return Ok(None),
            Some(EosToken::Id(id)) => {
                let token = self.id_to_token(*id).ok_or_else(|| refuse(format!("has no token {id}")))?;
                return Ok(Some(EosTokenId { id: *id, token }));
            }
            Some(EosToken::Token(token)) => return self.named(token).map(Some),
            None => {}
        }
        let Some(path) = self.path() else { return Ok(None) };
        let config = path.with_file_name(Self::CONFIG_FILE);
        if config.is_file() {
            let text = fs::read(&config).context("read", &config)?;
            let config: ConfigFile = serde_json::from_slice(&text)
                .map_err(|error| DataError::Tokenizer { path: config, what: error.to_string() })?;
            match config.eos_token {
                Some(Named::Token(token) | Named::Added { content: token }) => {
                    return self.named(&token).map(Some);
                }
                None => {}
            }
        }
        let known: Vec<&str> = KNOWN.into_iter().filter(|token| self.token_to_id(token).is_some()).collect();
        match known[..] {
            [token] => self.named(token).map(Some),
            [] => Err(refuse("has none of the usual ones".to_owned())),
            _ => Err(refuse(format!("has several: {}", known.join(", ")))),
        }
    }

    fn named(&self, token: &str) -> Result<EosTokenId, DataError> {
        let id = self.token_to_id(token);
        let id = id.ok_or_else(|| DataError::EosToken { what: format!("has no token \"{token}\"") })?;
        Ok(EosTokenId { id, token: token.to_owned() })
    }
}

/// What is of interest in `tokenizer_config.json`.
#[derive(Deserialize)]
struct ConfigFile {
    eos_token: Option<Named>,
}

/// A token by name, as several versions of transformers write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Named {
    Token(String),
    Added { content: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_none() {
        assert_eq!(Tokenizer::Byte.eos_token(None).unwrap(), None);
        assert_eq!(Tokenizer::Byte.eos_token(Some(&"none".parse().unwrap())).unwrap(), None);
        for token in ["10", "</s>"] {
            let error = Tokenizer::Byte.eos_token(Some(&token.parse().unwrap())).unwrap_err().to_string();
            assert!(error.contains("has no token") && error.contains(token), "{error}");
        }
    }
}
