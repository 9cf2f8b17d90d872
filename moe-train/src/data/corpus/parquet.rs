//! Documents of Parquet files.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::parquet::basic::{ConvertedType, LogicalType, Type};
use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use ::parquet::data_type::{ByteArray, ByteArrayType};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};

use super::super::{DataError, TokenizeError};
use super::input::Input;
use super::plan::Segment;
use super::source::Source;
use crate::durable::Context;

/// Rows that are read at a time.
const ROWS: usize = 64;

/// Rows of one column of strings.
pub(super) struct Column<'a> {
    input: &'a Input,
    reader: ColumnReaderImpl<ByteArrayType>,
    /// Whether rows may have no value.
    optional: bool,
    /// What was read ahead: which rows have a value, and the values.
    levels: Vec<i16>,
    values: std::vec::IntoIter<ByteArray>,
    /// The next row of those read ahead.
    next: usize,
    /// Rows of the file that were given.
    row: u64,
    /// Rows of the segment, and how many of them were given.
    rows: u64,
    given: u64,
    bytes: u64,
}

/// Bytes that a column takes of each row group of a file.
pub(super) fn row_groups(path: &Path, field: &str) -> Result<Vec<u64>, DataError> {
    let reader = open(path)?;
    let column = find(path, &reader, field)?;
    let groups = reader.metadata().row_groups();
    groups.iter().map(|group| unsigned(path, group.column(column).compressed_size())).collect()
}

impl<'a> Column<'a> {
    pub fn open(input: &'a Input, segment: &Segment, field: &str) -> Result<Self, DataError> {
        let path = &input.path;
        let reader = open(path)?;
        let column = find(path, &reader, field)?;
        let group = segment.span.start as usize;
        let groups = reader.metadata().row_groups();
        let rows = |group: &::parquet::file::metadata::RowGroupMetaData| unsigned(path, group.num_rows());
        let before: Result<Vec<u64>, DataError> = groups.iter().take(group).map(rows).collect();
        let of_group = groups.get(group).ok_or_else(|| DataError::Changed { path: path.clone() })?;
        let optional = of_group.column(column).column_descr().max_def_level() > 0;
        let rows = rows(of_group)?;
        let reader = guard(path, || reader.get_row_group(group)?.get_column_reader(column))?;
        let ColumnReader::ByteArrayColumnReader(reader) = reader else {
            return Err(DataError::Changed { path: path.clone() });
        };
        Ok(Column {
            input,
            reader,
            optional,
            levels: Vec::new(),
            values: Vec::new().into_iter(),
            next: 0,
            row: before?.iter().sum(),
            rows,
            given: 0,
            bytes: segment.bytes,
        })
    }

    /// Reads rows ahead.
    fn fill(&mut self) -> Result<(), DataError> {
        let path = &self.input.path;
        let mut values = Vec::with_capacity(ROWS);
        self.levels.clear();
        self.next = 0;
        let Column { reader, levels, .. } = self;
        let (rows, ..) = guard(path, || reader.read_records(ROWS, Some(levels), None, &mut values))?;
        if rows == 0 {
            let what = format!("a row group has {} rows, but is said to have {}", self.given, self.rows);
            return Err(DataError::Input { path: path.clone(), what });
        }
        if !self.optional {
            self.levels = vec![0; rows];
        }
        self.values = values.into_iter();
        Ok(())
    }
}

impl Source for Column<'_> {
    fn next(&mut self, text: &mut Vec<u8>) -> Result<Option<u64>, DataError> {
        text.clear();
        if self.given == self.rows {
            return Ok(None);
        }
        if self.next == self.levels.len() {
            self.fill()?;
        }
        let has_value = !self.optional || self.levels[self.next] > 0;
        self.next += 1;
        // The share of the rows so far, so that all have all bytes.
        let share = |rows: u64| (u128::from(self.bytes) * u128::from(rows) / u128::from(self.rows)) as u64;
        let bytes = share(self.given + 1) - share(self.given);
        self.given += 1;
        self.row += 1;
        if has_value {
            let value = self
                .values
                .next()
                .ok_or_else(|| self.refuse(TokenizeError::Refused("it has no value".to_owned())))?;
            text.extend_from_slice(value.data());
            if let Err(error) = std::str::from_utf8(text) {
                return Err(self.refuse(TokenizeError::Utf8 { at: error.valid_up_to() }));
            }
        }
        Ok(Some(bytes))
    }

    fn refuse(&self, error: TokenizeError) -> DataError {
        DataError::Row { path: self.input.path.clone(), row: self.row - 1, source: error }
    }
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).context("open", path)?;
    guard(path, || SerializedFileReader::new(file))
}

/// Reads. The crate takes the lengths in a page on trust: of a damaged one it may panic, which is an error like any other. What
/// it was reading with is not used any more.
fn guard<T>(path: &Path, read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    let what = match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "it is damaged: a page is shorter than what it says is in it".to_owned(),
    };
    Err(DataError::Input { path: path.to_owned(), what })
}

/// The number of a column, which has to be one of strings.
fn find(path: &Path, reader: &SerializedFileReader<File>, field: &str) -> Result<usize, DataError> {
    let refuse = |what: String| Err(DataError::Input { path: path.to_owned(), what });
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let Some(i) = columns.iter().position(|column| column.path().parts() == [field]) else {
        let names: Vec<String> = columns.iter().map(|column| column.path().string()).collect();
        return refuse(format!("it has no column `{field}` of strings, but {}", names.join(", ")));
    };
    let column = &columns[i];
    // Some programs write strings without saying so.
    let text = matches!(
        (column.logical_type_ref(), column.converted_type()),
        (Some(LogicalType::String), _) | (None, ConvertedType::UTF8 | ConvertedType::NONE)
    );
    match text && column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0 {
        true => Ok(i),
        false => refuse(format!("the column `{field}` is not of strings, but of {}", column.physical_type())),
    }
}

/// A number that cannot be negative.
fn unsigned(path: &Path, number: i64) -> Result<u64, DataError> {
    let what = || format!("its metadata says {number} rows or bytes");
    u64::try_from(number).map_err(|_| DataError::Input { path: path.to_owned(), what: what() })
}
