//! How inputs are cut into parts.

use std::fs::File;
use std::ops::Range;

use super::super::DataError;
use super::super::cut::document_end;
use super::input::{Input, InputFormat};
use crate::durable::Context;

/// A piece of a file that can be read by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Which of the inputs.
    pub input: usize,
    /// Of a text, its bytes, which are whole documents. Of JSON lines, bytes: the lines that start in them. Of Parquet, row groups.
    pub span: Range<u64>,
    /// Bytes of the file that it takes.
    pub bytes: u64,
}

/// What is encoded, in order. It depends on the inputs, the field and the size of a part alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    segments: Vec<Segment>,
    /// Where each part starts among the segments, and the end.
    starts: Vec<usize>,
    /// Bytes of all parts.
    pub bytes: u64,
}

impl Plan {
    /// Cuts files that are longer than a part, and puts together those that are shorter.
    pub fn new(inputs: &[Input], field: &str, part_bytes: u64) -> Result<Self, DataError> {
        let mut segments = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            let mut push = |span, bytes| segments.push(Segment { input: i, span, bytes });
            match input.format {
                InputFormat::Text => text(input, part_bytes, push)?,
                InputFormat::Jsonl => {
                    for start in (0..input.bytes).step_by(part_bytes as usize) {
                        let end = input.bytes.min(start + part_bytes);
                        push(start..end, end - start);
                    }
                }
                InputFormat::Parquet => parquet(input, field, push)?,
            }
        }
        let (mut starts, mut taken) = (vec![0], 0);
        for (i, segment) in segments.iter().enumerate() {
            if taken > 0 && taken + segment.bytes > part_bytes {
                starts.push(i);
                taken = 0;
            }
            taken += segment.bytes;
        }
        if !segments.is_empty() {
            starts.push(segments.len());
        }
        let bytes = segments.iter().map(|segment| segment.bytes).sum();
        Ok(Plan { segments, starts, bytes })
    }

    /// The number of parts.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The segments of part `i`.
    pub fn part(&self, i: usize) -> &[Segment] {
        &self.segments[self.starts[i]..self.starts[i + 1]]
    }
}

/// Cuts between documents, of which there are as many as if the text was read from its start.
fn text(input: &Input, part_bytes: u64, mut push: impl FnMut(Range<u64>, u64)) -> Result<(), DataError> {
    let Input { path, bytes, .. } = input;
    let mut start = 0;
    if *bytes > part_bytes {
        let mut file = File::open(path).context("open", path)?;
        let mut end = 0;
        while end < *bytes {
            end = document_end(&mut file, path, end, *bytes)?;
            if end - start >= part_bytes {
                push(start..end, end - start);
                start = end;
            }
        }
    }
    // What is left; of an empty file, its empty document.
    if start < *bytes || *bytes == 0 {
        push(start..*bytes, bytes - start);
    }
    Ok(())
}

#[cfg(feature = "parquet")]
fn parquet(input: &Input, field: &str, mut push: impl FnMut(Range<u64>, u64)) -> Result<(), DataError> {
    for (i, bytes) in (0..).zip(super::parquet::row_groups(&input.path, field)?) {
        push(i..i + 1, bytes);
    }
    Ok(())
}

#[cfg(not(feature = "parquet"))]
fn parquet(input: &Input, _field: &str, _push: impl FnMut(Range<u64>, u64)) -> Result<(), DataError> {
    Err(DataError::Feature { path: input.path.clone(), feature: "parquet" })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn plan(files: &[(&str, usize)], part_bytes: u64) -> Vec<Vec<(usize, Range<u64>)>> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
        for (path, (_, bytes)) in paths.iter().zip(files) {
            fs::write(path, &b"0123456\n".repeat(bytes.div_ceil(8))[..*bytes]).unwrap();
        }
        let inputs = Input::open_all(&paths, None).unwrap();
        let plan = Plan::new(&inputs, "text", part_bytes).unwrap();
        assert_eq!(plan.bytes, files.iter().map(|&(_, bytes)| bytes as u64).sum::<u64>());
        let segments = |i| plan.part(i).iter().map(|segment| (segment.input, segment.span.clone()));
        (0..plan.len()).map(|i| segments(i).collect()).collect()
    }

    #[test]
    fn long_files_are_cut_and_short_ones_are_put_together() {
        let files = [("a.jsonl", 5), ("b.jsonl", 25), ("c.txt", 3), ("d.txt", 0), ("e.txt", 8), ("f.txt", 9)];
        let want = [
            vec![(0, 0..5)],
            vec![(1, 0..10)],
            vec![(1, 10..20)],
            vec![(1, 20..25), (2, 0..3), (3, 0..0)],
            vec![(4, 0..8)],
            vec![(5, 0..9)],
        ];
        assert_eq!(plan(&files, 10), want);
        assert_eq!(plan(&[("a.jsonl", 0)], 10), [[]; 0]);
        assert_eq!(plan(&[("a.txt", 0)], 10), [[(0, 0..0)]]);
    }

    /// Documents of a long text have 65536 bytes, as many lines as that; so does the smallest part.
    #[test]
    fn texts_are_cut_between_documents() {
        let long = 3 * 65536 + 20;
        assert_eq!(
            plan(&[("a.txt", long)], 70_000),
            [vec![(0, 0..131_072)], vec![(0, 131_072..long as u64)]]
        );
        assert_eq!(plan(&[("a.txt", long)], 1).len(), 4);
    }
}
