//! `metrics.jsonl`: one JSON object per line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{Context, IoError, create_new};

/// Why metrics could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetricsError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A line of an earlier part of the run cannot be read.
    #[error("{}, line {line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The reason.
        message: String,
    },
    /// A record is not representable.
    #[error("a record for {} cannot be written as JSON: {message}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The reason.
        message: String,
    },
}

/// Appends records, each in one write, floats with all their digits.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
    evaluated: Option<u64>,
}

/// What a line says of its place.
#[derive(Deserialize)]
struct Line {
    step: u64,
    val_loss: Option<f64>,
}

impl JsonLines {
    /// A new file.
    ///
    /// # Errors
    /// It exists already or cannot be made.
    pub fn create(path: &Path) -> Result<Self, MetricsError> {
        Ok(JsonLines { path: path.to_owned(), file: create_new(path)?, evaluated: None })
    }

    /// Goes on with a file after step `step`: lines of later steps are removed, and so is a last line that was not
    /// written to its end. Makes the file if there is none.
    ///
    /// # Errors
    /// A line is no record of a step, or the file cannot be changed.
    pub fn resume(path: &Path, step: u64) -> Result<Self, MetricsError> {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = opened.context("open", path)?;
        let (keep, evaluated) = lines_up_to(&file, path, step)?;
        file.set_len(keep).and_then(|()| file.seek(SeekFrom::End(0))).context("write", path)?;
        Ok(JsonLines { path: path.to_owned(), file, evaluated })
    }

    /// The step of the last evaluation that the file had when it was opened.
    pub fn evaluated(&self) -> Option<u64> {
        self.evaluated
    }

    /// Adds a line.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&mut self, record: &impl Serialize) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(record)
            .map_err(|error| MetricsError::Record { path: self.path.clone(), message: error.to_string() })?;
        line.push(b'\n');
        Ok(self.file.write_all(&line).context("write", &self.path)?)
    }

    /// Returns when all lines are on the disk.
    ///
    /// # Errors
    /// They cannot be written there.
    pub fn sync(&self) -> Result<(), MetricsError> {
        Ok(self.file.sync_data().context("write", &self.path)?)
    }
}

/// The length of the lines before the first one of a later step, and the step of the last evaluation among them.
fn lines_up_to(file: &File, path: &Path, step: u64) -> Result<(u64, Option<u64>), MetricsError> {
    let mut reader = BufReader::new(file);
    let (mut length, mut number, mut evaluated) = (0, 0, None);
    let mut line = Vec::new();
    loop {
        line.clear();
        number += 1;
        reader.read_until(b'\n', &mut line).context("read", path)?;
        // Nothing, or a line that a crash cut off.
        if line.last() != Some(&b'\n') {
            return Ok((length, evaluated));
        }
        match serde_json::from_slice(&line) {
            Ok(Line { step: found, .. }) if found > step => return Ok((length, evaluated)),
            Ok(Line { step: found, val_loss }) => {
                length += line.len() as u64;
                evaluated = val_loss.map(|_| found).or(evaluated);
            }
            Err(error) => {
                let (path, message) = (path.to_owned(), error.to_string());
                return Err(MetricsError::Line { path, line: number, message });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{EvalRecord, StepRecord};
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: Some(0.1 + 0.2),
            total_loss: None,
            grad_norm: Some(f64::MIN_POSITIVE),
            lr: 1e-3,
            tokens: 512 * step,
            blend_tokens: Vec::new(),
            tokens_per_second: 1234.5,
            tflops_per_rank: 0.75,
            mfu: (step > 1).then_some(0.375),
            peak_memory_bytes: (step > 1).then_some(u64::MAX),
            aux_loss: 1.0,
            sequence_aux_loss: 1.0,
            global_aux_loss: 1.0,
            z_loss: 2.0 / 3.0,
            dropped_tokens: 0,
            reruns: 0,
            skipped_steps: 0,
            expert_load: vec![vec![0.75, 0.25]],
            moe_layers: Vec::new(),
        }
    }

    #[test]
    fn floats_keep_all_digits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = JsonLines::create(&path).unwrap();
        lines.write(&record(1)).unwrap();
        lines.write(&EvalRecord { step: 1, val_loss: 1.0 / 3.0, val_losses: Vec::new() }).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let [step, eval] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert_eq!(serde_json::from_str::<StepRecord>(step).unwrap(), record(1));
        assert_eq!(eval, "{\"step\":1,\"val_loss\":0.3333333333333333}");
        assert!(step.starts_with("{\"step\":1,\"loss\":0.30000000000000004,\"total_loss\":null,"), "{step}");
        assert!(JsonLines::create(&path).is_err(), "a run is never overwritten");
    }

    #[test]
    fn resuming_drops_later_steps_and_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let whole = {
            let mut lines = JsonLines::create(&path).unwrap();
            for step in 1..=5 {
                lines.write(&record(step)).unwrap();
                lines.write(&EvalRecord { step, val_loss: 2.0, val_losses: Vec::new() }).unwrap();
            }
            fs::read_to_string(&path).unwrap()
        };
        // The crash came anywhere after step 3 was saved.
        let saved: usize = whole.lines().take(6).map(|line| line.len() + 1).sum();
        for cut in saved..=whole.len() {
            fs::remove_file(&path).unwrap();
            fs::write(&path, &whole[..cut]).unwrap();
            let mut lines = JsonLines::resume(&path, 3).unwrap();
            assert_eq!(lines.evaluated(), Some(3));
            for step in 4..=5 {
                lines.write(&record(step)).unwrap();
                lines.write(&EvalRecord { step, val_loss: 2.0, val_losses: Vec::new() }).unwrap();
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn a_foreign_file_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\nhello\n").unwrap();
        let error = JsonLines::resume(&path, 3).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl, line 2: "), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\nhello\n");
    }

    #[test]
    fn the_spread_is_relative_to_balance() {
        let mut record = record(1);
        record.expert_load = vec![vec![0.5, 0.25, 0.25, 0.0], vec![0.25; 4]];
        assert_eq!(record.load_spread(), Some((0.0, 2.0)));
        record.expert_load.clear();
        assert_eq!(record.load_spread(), None);
    }
}
