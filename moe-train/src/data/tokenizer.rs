//! Text as tokens.

/// Each byte is a token; any bytes are text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ByteTokenizer;

impl ByteTokenizer {
    /// Distinct tokens.
    pub const VOCAB_SIZE: usize = 256;

    /// The tokens of a text.
    pub fn encode(self, text: &[u8]) -> Vec<u32> {
        text.iter().map(|&byte| u32::from(byte)).collect()
    }

    /// The text of tokens; what is no UTF-8 or no byte (a vocabulary may have unused rows) becomes `U+FFFD`.
    pub fn decode(self, tokens: &[u32]) -> String {
        // 0xFF never occurs in UTF-8.
        let bytes: Vec<u8> = tokens.iter().map(|&token| u8::try_from(token).unwrap_or(0xFF)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let text = "für 3 €\n";
        let tokens = ByteTokenizer.encode(text.as_bytes());
        assert_eq!(tokens.len(), text.len());
        assert_eq!(tokens[1], 0xC3);
        assert_eq!(ByteTokenizer.decode(&tokens), text);
    }

    #[test]
    fn what_is_no_text_is_marked() {
        assert_eq!(ByteTokenizer.decode(&[65, 0xC3, 66]), "A\u{FFFD}B");
        assert_eq!(ByteTokenizer.decode(&[65, 256, 66]), "A\u{FFFD}B");
    }
}
