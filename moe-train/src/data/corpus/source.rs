//! Documents, one after the other.

use super::super::{DataError, TokenizeError};
use super::input::{Input, InputFormat};
use super::json_lines::JsonLines;
use super::plan::Segment;
use super::text::TextFile;

/// Reads the documents of a segment.
pub(super) trait Source {
    /// Puts the text of the next document into `text`, and says how many bytes of the file it took; none after the last one.
    fn next(&mut self, text: &mut Vec<u8>) -> Result<Option<u64>, DataError>;

    /// Says where the document is that was read last, and what the tokenizer has against it.
    fn refuse(&self, error: TokenizeError) -> DataError;
}

/// Opens a segment of a file.
pub(super) fn open<'a>(
    input: &'a Input,
    segment: &Segment,
    field: &'a str,
) -> Result<Box<dyn Source + 'a>, DataError> {
    Ok(match input.format {
        InputFormat::Text => Box::new(TextFile::open(input, segment)?),
        InputFormat::Jsonl => Box::new(JsonLines::open(input, segment, field)?),
        #[cfg(feature = "parquet")]
        InputFormat::Parquet => Box::new(super::parquet::Column::open(input, segment, field)?),
        #[cfg(not(feature = "parquet"))]
        InputFormat::Parquet => {
            return Err(DataError::Feature { path: input.path.clone(), feature: "parquet" });
        }
    })
}
