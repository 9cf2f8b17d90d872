//! Token files: a checksummed header, tokens of fixed width, where documents start, and which tokens are learnt.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `MOETOKEN` |
//! | 8 | 4 | version: 1, or 2 with a mask |
//! | 12 | 4 | bytes of a token: 1, 2 or 4 |
//! | 16 | 8 | vocabulary: all tokens are below |
//! | 24 | 8 | tokens |
//! | 32 | 8 | documents |
//! | 40 | 32 | BLAKE3 of everything after the header |
//! | 72 | 32 | BLAKE3 of bytes 0 to 72 |
//! | 104 | 24 | zero |
//! | 128 | | tokens, zeros up to a multiple of 8, then `documents + 1` offsets of 8 bytes, from 0 to `tokens` |
//! | | | version 2: a bit per token, the lowest of a byte first, 1 if the loss counts it as a target; zeros up to a multiple of 8 bytes |
//!
//! All numbers are little-endian.

mod read;
mod write;

pub use read::TokenFile;
pub use write::TokenFileWriter;

const MAGIC: &[u8; 8] = b"MOETOKEN";
/// Without and with a mask.
const VERSIONS: [u32; 2] = [1, 2];
const HEADER: usize = 128;

/// What is wrong with a token file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// It does not start as token files do.
    #[error(
        "this is no token file (it does not start with \"MOETOKEN\"); a dataset of Megatron is named without .bin and .idx, \
         and a .bin of nanoGPT is imported by `moe-train data import-nanogpt`"
    )]
    Foreign,
    /// A later version of this crate made it.
    #[error("version {found} is not supported (this program reads versions {} and {})", VERSIONS[0], VERSIONS[1])]
    Version {
        /// The version.
        found: u32,
    },
    /// The header's checksum is wrong.
    #[error("the header is damaged")]
    Header,
    /// It is shorter or longer than its header says.
    #[error("{found} bytes, but {expected} were expected: it was cut off or extended")]
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// The checksum of tokens and documents is wrong.
    #[error("the content is damaged (its checksum is wrong)")]
    Content,
    /// A document is outside of the tokens, or ends before it starts.
    #[error("document {i} is said to be tokens {start}..{end}: the content is damaged")]
    Document {
        /// The document, from 0.
        i: u64,
        /// Its first token.
        start: u64,
        /// The token after its last one.
        end: u64,
    },
    /// A token or document was asked for that it does not have.
    #[error("{what} {start}..{end} of {len}")]
    OutOfRange {
        /// Tokens or documents.
        what: &'static str,
        /// The first one.
        start: u64,
        /// The one after the last.
        end: u64,
        /// How many there are.
        len: u64,
    },
}

/// The header's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    width: usize,
    vocab_size: u64,
    tokens: u64,
    documents: u64,
    masked: bool,
    content: [u8; 32],
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSIONS[usize::from(self.masked)].to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.vocab_size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.documents.to_le_bytes());
        bytes[40..72].copy_from_slice(&self.content);
        let hash = blake3::hash(&bytes[..72]);
        bytes[72..104].copy_from_slice(hash.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, Fault> {
        if !bytes.starts_with(MAGIC) {
            return Err(Fault::Foreign);
        }
        let Some(bytes) = bytes.first_chunk::<HEADER>() else {
            return Err(Fault::Length { expected: HEADER as u64, found: bytes.len() as u64 });
        };
        let version = u32_at(bytes, 8);
        let header = Header {
            width: u32_at(bytes, 12) as usize,
            vocab_size: u64_at(bytes, 16),
            tokens: u64_at(bytes, 24),
            documents: u64_at(bytes, 32),
            masked: version == VERSIONS[1],
            content: std::array::from_fn(|i| bytes[40 + i]),
        };
        let intact =
            blake3::hash(&bytes[..72]).as_bytes() == &bytes[72..104] && bytes[104..] == [0; HEADER - 104];
        match version {
            _ if !intact => Err(Fault::Header),
            found if !VERSIONS.contains(&found) => Err(Fault::Version { found }),
            _ if matches!(header.width, 1 | 2 | 4) => Ok(header),
            _ => Err(Fault::Header),
        }
    }

    /// Where the document offsets and the mask start, and the length of the file; none if that is more than can be.
    fn extent(&self) -> Option<[u64; 3]> {
        let tokens = self.tokens.checked_mul(self.width as u64)?.checked_next_multiple_of(8)?;
        let index = tokens.checked_add(HEADER as u64)?;
        let mask = index.checked_add(self.documents.checked_add(1)?.checked_mul(8)?)?;
        let mask_bytes = if self.masked { self.tokens.div_ceil(8).checked_next_multiple_of(8)? } else { 0 };
        Some([index, mask, mask.checked_add(mask_bytes)?])
    }
}

/// Reads a number that the caller knows to be there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests;
