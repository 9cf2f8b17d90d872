//! Text of tokens that come one after another.

use super::{TokenizeError, Tokenizer};

/// Decodes tokens as they come: the text of a token may depend on those before it, and a character may need several.
///
/// What [`push`](Self::push) and [`finish`](Self::finish) give is together the text of all tokens.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// Tokens that were shown last, which the text of the others may depend on, and those not shown yet.
    tokens: Vec<u32>,
    /// How many of them were shown.
    shown: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        TextStream { tokenizer, skip_special_tokens, tokens: Vec::new(), shown: 0 }
    }

    /// The text that another token completes; empty if a character is still open.
    ///
    /// # Errors
    /// The tokenizer refuses.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizeError> {
        self.tokens.push(token);
        let text = self.new_text()?;
        if text.is_empty() || text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        self.tokens.drain(..self.shown);
        self.shown = self.tokens.len();
        Ok(text)
    }

    /// The rest, where the last character was never completed.
    ///
    /// # Errors
    /// The tokenizer refuses.
    pub fn finish(self) -> Result<String, TokenizeError> {
        self.new_text()
    }

    /// What is not shown yet: the text of all tokens, without that of those shown.
    fn new_text(&self) -> Result<String, TokenizeError> {
        let shown = self.tokenizer.decode(&self.tokens[..self.shown], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.tokens, self.skip_special_tokens)?;
        Ok(all.get(shown.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_appear_when_they_are_complete() {
        let mut stream = Tokenizer::Byte.stream(false);
        let pieces: Vec<String> = "a€b".bytes().map(|byte| stream.push(byte.into()).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "€", "b"]);
        assert_eq!(stream.push(0xE2).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
    }
}
