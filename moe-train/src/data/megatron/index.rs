//! The `.idx`.

use std::ops::Range;

use super::{Fault, HEADER, MAGIC, VERSION, index_bytes};

/// How tokens are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MegatronDType {
    /// One byte.
    U8,
    /// One byte, signed.
    I8,
    /// Two bytes, signed.
    I16,
    /// Four bytes, signed.
    I32,
    /// Eight bytes, signed.
    I64,
    /// Two bytes.
    U16,
}

impl MegatronDType {
    /// The smaller of the two types that Megatron chooses from (`DType.optimal_dtype`) that holds a vocabulary of
    /// `vocab_size` tokens.
    pub fn optimal(vocab_size: u32) -> Self {
        if vocab_size < 65500 { Self::U16 } else { Self::I32 }
    }

    /// The number that stands for it in an index.
    pub fn code(self) -> u8 {
        match self {
            Self::U8 => 1,
            Self::I8 => 2,
            Self::I16 => 3,
            Self::I32 => 4,
            Self::I64 => 5,
            Self::U16 => 8,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::U8, Self::I8, Self::I16, Self::I32, Self::I64, Self::U16]
            .into_iter()
            .find(|d| d.code() == code)
    }

    /// Bytes of a token.
    pub fn width(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

/// A checked index, over bytes that may be mapped. It allocates nothing, whatever the bytes say.
///
/// ```
/// use moe_train::data::megatron::{MegatronDType, MegatronIndex};
///
/// let mut idx = b"MMIDIDX\0\0".to_vec();
/// idx.extend(1_u64.to_le_bytes()); // version
/// idx.push(8); // uint16
/// idx.extend([2_u64, 3].map(u64::to_le_bytes).concat()); // 2 sequences, 3 document indices
/// idx.extend([5_i32, 2].map(i32::to_le_bytes).concat());
/// idx.extend([0_i64, 10].map(i64::to_le_bytes).concat());
/// idx.extend([0_i64, 1, 2].map(i64::to_le_bytes).concat());
///
/// let index = MegatronIndex::new(&idx, 14)?;
/// assert_eq!((index.dtype(), index.tokens(), index.documents()), (MegatronDType::U16, 7, 2));
/// assert_eq!(index.document(1), Some(5..7));
/// assert!(MegatronIndex::new(&idx, 13).is_err());
/// # Ok::<(), moe_train::data::megatron::Fault>(())
/// ```
#[derive(Debug, Clone)]
pub struct MegatronIndex<B> {
    bytes: B,
    dtype: MegatronDType,
    sequences: usize,
    documents: u64,
    tokens: u64,
}

impl<B: AsRef<[u8]>> MegatronIndex<B> {
    /// Checks every byte of an `.idx`, in one pass, against a `.bin` of `bin_bytes`.
    ///
    /// # Errors
    /// What Megatron would not have written.
    pub fn new(bytes: B, bin_bytes: u64) -> Result<Self, Fault> {
        let all = bytes.as_ref();
        let found = all.len() as u64;
        if !all.starts_with(MAGIC) {
            return Err(Fault::Foreign);
        }
        let Some((header, rest)) = all.split_first_chunk::<HEADER>() else {
            return Err(Fault::IndexLength { sequences: 0, document_indices: 0, found });
        };
        let version = u64_at(header, 9);
        if version != VERSION {
            return Err(Fault::Version { found: version });
        }
        let dtype = MegatronDType::from_code(header[17]).ok_or(Fault::DType { code: header[17] })?;
        let (sequences, document_indices) = (u64_at(header, 18), u64_at(header, 26));
        let expected = index_bytes(sequences, document_indices);
        match u128::from(found) {
            bytes if bytes == expected => {}
            bytes if bytes == expected + u128::from(sequences) => return Err(Fault::Multimodal),
            _ => return Err(Fault::IndexLength { sequences, document_indices, found }),
        }
        // What follows is inside of the bytes, so its numbers are those of a `usize`.
        let sequences = sequences as usize;
        let (lengths, rest) = rest.split_at(4 * sequences);
        let (pointers, indices) = rest.split_at(8 * sequences);
        let end = check_sequences(lengths, pointers, dtype.width() as u64)?;
        if end != bin_bytes {
            return Err(Fault::BinLength { expected: end, found: bin_bytes });
        }
        check_documents(indices, sequences as i64)?;
        let (documents, tokens) = (document_indices - 1, end / dtype.width() as u64);
        Ok(MegatronIndex { bytes, dtype, sequences, documents, tokens })
    }

    /// How tokens are stored.
    pub fn dtype(&self) -> MegatronDType {
        self.dtype
    }

    /// The number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The number of sequences.
    pub fn sequences(&self) -> u64 {
        self.sequences as u64
    }

    /// The number of documents.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// The tokens of document `i`, as a range of all tokens; none if there is no such document.
    pub fn document(&self, i: u64) -> Option<Range<u64>> {
        (i < self.documents).then(|| self.document_start(i)..self.document_start(i + 1))
    }

    /// Where document `i` starts, at most [`documents`](Self::documents).
    fn document_start(&self, i: u64) -> u64 {
        let bytes = self.bytes.as_ref();
        let (pointers, indices) = (HEADER + 4 * self.sequences, HEADER + 12 * self.sequences);
        let sequence = u64_at(bytes, indices + 8 * i as usize);
        match usize::try_from(sequence) {
            Ok(sequence) if sequence < self.sequences => {
                u64_at(bytes, pointers + 8 * sequence) / self.dtype.width() as u64
            }
            _ => self.tokens,
        }
    }

    /// The bytes it was read from.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

/// That each sequence starts where the one before it ends; where the last one does.
fn check_sequences(lengths: &[u8], pointers: &[u8], width: u64) -> Result<u64, Fault> {
    let (lengths, pointers) = (lengths.as_chunks().0, pointers.as_chunks().0);
    let mut expected = 0;
    for (sequence, (&length, &pointer)) in (0..).zip(lengths.iter().zip(pointers)) {
        let (length, found) = (i32::from_le_bytes(length), i64::from_le_bytes(pointer));
        if i64::try_from(expected) != Ok(found) {
            return Err(Fault::Pointer { sequence, expected, found });
        }
        let tokens = u64::try_from(length).map_err(|_| Fault::SequenceLength { sequence, length })?;
        // Below 2^63 + 2^31·8, since `found` was below 2^63.
        expected += tokens * width;
    }
    Ok(expected)
}

/// That document indices rise from 0 to the number of sequences.
fn check_documents(indices: &[u8], sequences: i64) -> Result<(), Fault> {
    let indices = indices.as_chunks().0;
    let last = indices.len().checked_sub(1).ok_or(Fault::NoDocumentIndices)?;
    let mut before = 0;
    for (i, &index) in indices.iter().enumerate() {
        let found = i64::from_le_bytes(index);
        let from = if i == last { sequences } else { before };
        let to = if i == 0 { 0 } else { sequences };
        if !(from..=to).contains(&found) {
            return Err(Fault::DocumentIndex { document: i as u64, found, from, to });
        }
        before = found;
    }
    Ok(())
}

/// Reads a number that the caller knows to be there.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
