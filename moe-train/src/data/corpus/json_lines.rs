//! Documents of JSON lines.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::super::{DataError, TokenizeError, string_field};
use super::input::Input;
use super::plan::Segment;
use super::source::Source;
use crate::durable::Context;

/// A line has to fit into memory, several times.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes that are read at a time.
const BUFFER: usize = 1 << 16;

/// The lines that start in a piece of a file.
pub(super) struct JsonLines<'a> {
    input: &'a Input,
    field: &'a str,
    file: BufReader<File>,
    line: Vec<u8>,
    /// Where the line starts that was read last.
    start: u64,
    /// Where it ends.
    at: u64,
    end: u64,
}

impl<'a> JsonLines<'a> {
    pub fn open(input: &'a Input, segment: &Segment, field: &'a str) -> Result<Self, DataError> {
        let path = &input.path;
        let mut file = BufReader::with_capacity(BUFFER, File::open(path).context("open", path)?);
        // A line that starts before belongs to the piece before: what is left of it is passed over. It may end right here.
        let mut at = segment.span.start;
        if at > 0 {
            file.seek(SeekFrom::Start(at - 1)).context("read", path)?;
            at = at - 1 + file.skip_until(b'\n').context("read", path)? as u64;
        }
        Ok(JsonLines { input, field, file, line: Vec::new(), start: at, at, end: segment.span.end })
    }

    /// An error of the line that was read last.
    fn fault(&self, what: String) -> DataError {
        let path = &self.input.path;
        match line_number(path, self.start) {
            Ok(line) => DataError::Line { path: path.clone(), line, what },
            Err(error) => error,
        }
    }
}

impl Source for JsonLines<'_> {
    fn next(&mut self, text: &mut Vec<u8>) -> Result<Option<u64>, DataError> {
        text.clear();
        if self.at >= self.end {
            return Ok(None);
        }
        let path = &self.input.path;
        self.line.clear();
        self.start = self.at;
        let read = self.file.by_ref().take(MOST_BYTES + 1).read_until(b'\n', &mut self.line);
        let bytes = read.context("read", path)? as u64;
        self.at += bytes;
        if bytes == 0 {
            return Err(DataError::Changed { path: path.clone() });
        }
        if bytes > MOST_BYTES {
            return Err(self.fault(format!("a line of more than {MOST_BYTES} bytes: are these JSON lines?")));
        }
        match string_field(&self.line, self.field) {
            Ok(found) => text.extend_from_slice(found.unwrap_or_default().as_bytes()),
            Err(what) => return Err(self.fault(what)),
        }
        Ok(Some(bytes))
    }

    fn refuse(&self, error: TokenizeError) -> DataError {
        self.fault(error.to_string())
    }
}

/// The number of the line that starts at a byte, from 1.
fn line_number(path: &Path, start: u64) -> Result<u64, DataError> {
    let mut before = BufReader::with_capacity(BUFFER, File::open(path).context("open", path)?).take(start);
    let mut line = 1;
    loop {
        let block = before.fill_buf().context("read", path)?;
        let bytes = block.len();
        if bytes == 0 {
            return Ok(line);
        }
        line += block.iter().filter(|&&byte| byte == b'\n').count() as u64;
        before.consume(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::Input;
    use super::*;

    /// Whatever the pieces, each line is in one of them: in that where it starts.
    #[test]
    fn pieces_have_the_lines_that_start_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.jsonl");
        let texts = ["one", "", "a longer line", "é", "last"];
        let lines = texts.map(|text| format!("{{\"text\":\"{text}\"}}"));
        for end in ["", "\n", "\r\n"] {
            std::fs::write(&path, lines.join("\n") + end).unwrap();
            let input = Input::open_all(std::slice::from_ref(&path), None).unwrap().remove(0);
            for piece in 1..=input.bytes {
                let (mut found, mut taken) = (Vec::new(), 0);
                for start in (0..input.bytes).step_by(piece as usize) {
                    let span = start..input.bytes.min(start + piece);
                    let segment = Segment { input: 0, bytes: span.end - start, span };
                    let mut lines = JsonLines::open(&input, &segment, "text").unwrap();
                    let mut text = Vec::new();
                    while let Some(bytes) = lines.next(&mut text).unwrap() {
                        found.push(String::from_utf8(text.clone()).unwrap());
                        taken += bytes;
                    }
                }
                assert_eq!(found, texts, "pieces of {piece}");
                assert_eq!(taken, input.bytes);
            }
        }
    }
}
