//! TensorBoard event files: TFRecord frames around hand-written protocol buffers.
//!
//! A frame is `length: u64, crc(length): u32, data, crc(data): u32`, little-endian, with masked CRC-32C. The data is an
//! `Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; SessionLog session_log = 7 }`
//! with `Summary { repeated Value value = 1 }`, `Value { string tag = 1; float simple_value = 2 }` and
//! `SessionLog { SessionStatus status = 1 }` (tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto).

use std::borrow::Cow;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{EvalRecord, StepRecord};
use crate::durable::{Context, IoError, create_new};

/// One event file; each part of a run that was resumed has its own.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `folder`, for steps from `first_step` on. What earlier files say about these steps, TensorBoard
    /// forgets.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self, IoError> {
        std::fs::create_dir_all(folder).context("create", folder)?;
        // TensorBoard reads files in the order of their names, which start with the time.
        let (seconds, id) = (wall_time() as u64, std::process::id());
        let path = (0_u32..)
            .map(|n| folder.join(format!("events.out.tfevents.{seconds:010}.moe-train.{id}.{n}")))
            .find(|path| !path.exists())
            .unwrap_or_else(|| folder.join("events.out.tfevents"));
        let mut file = EventFile { file: create_new(&path)?, path };
        file.event(0, |event| event.bytes(3, b"brain.Event:2"))?;
        const START: u64 = 1;
        file.event(first_step, |event| event.message(7, |log| log.varint(1, START)))?;
        Ok(file)
    }

    /// The scalars of a training step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<(), IoError> {
        self.scalars(record.step, &record.scalars())
    }

    /// The scalars of an evaluation.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn eval(&mut self, record: &EvalRecord) -> Result<(), IoError> {
        self.scalars(record.step, &record.scalars())
    }

    fn scalars(&mut self, step: u64, scalars: &[(Cow<'static, str>, f64)]) -> Result<(), IoError> {
        self.event(step, |event| {
            event.message(5, |summary| {
                for (tag, value) in scalars {
                    summary.message(1, |entry| {
                        entry.bytes(1, tag.as_bytes());
                        entry.float(2, *value as f32);
                    });
                }
            });
        })
    }

    fn event(&mut self, step: u64, fill: impl FnOnce(&mut Message)) -> Result<(), IoError> {
        let mut event = Message::default();
        event.double(1, wall_time());
        event.varint(2, step);
        fill(&mut event);
        self.file.write_all(&frame(&event.0)).context("write", &self.path)
    }
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// A protocol buffer being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u64, value: u64) {
        self.raw_varint(field << 3);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.raw_varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.raw_varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.raw_varint(field << 3 | 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A field of a message as a reader sees it.
    #[derive(Debug, PartialEq)]
    enum Field<'a> {
        Varint(u64),
        Fixed64([u8; 8]),
        Bytes(&'a [u8]),
        Fixed32([u8; 4]),
    }

    fn varint(data: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = data.split_first().unwrap();
            *data = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }

    fn fields(mut data: &[u8]) -> Vec<(u64, Field<'_>)> {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let field = match key & 7 {
                0 => Field::Varint(varint(&mut data)),
                1 => Field::Fixed64(*data.split_off(..8).unwrap().first_chunk().unwrap()),
                2 => {
                    let length = varint(&mut data) as usize;
                    Field::Bytes(data.split_off(..length).unwrap())
                }
                5 => Field::Fixed32(*data.split_off(..4).unwrap().first_chunk().unwrap()),
                wire => panic!("wire type {wire}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    /// CRC-32C bit by bit.
    fn crc(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
            }
        }
        !crc
    }

    fn unmask(masked: [u8; 4]) -> u32 {
        u32::from_le_bytes(masked).wrapping_sub(0xA282_EAD8).rotate_left(15)
    }

    fn frames(mut file: &[u8]) -> Vec<&[u8]> {
        let mut frames = Vec::new();
        while !file.is_empty() {
            let length = file.split_off(..8).unwrap();
            assert_eq!(unmask(*file.split_off(..4).unwrap().first_chunk().unwrap()), crc(length));
            let data = file.split_off(..u64::from_le_bytes(*length.first_chunk().unwrap()) as usize).unwrap();
            assert_eq!(unmask(*file.split_off(..4).unwrap().first_chunk().unwrap()), crc(data));
            frames.push(data);
        }
        frames
    }

    #[test]
    fn a_reader_finds_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), 300).unwrap();
        file.eval(&EvalRecord { step: 300, val_loss: 1.5, val_losses: Vec::new() }).unwrap();
        file.scalars(301, &[("a".into(), 0.25), ("b".into(), -3.0)]).unwrap();
        let bytes = fs::read(&file.path).unwrap();
        let events: Vec<_> = frames(&bytes).into_iter().map(fields).collect();
        assert_eq!(events.len(), 4);
        assert_eq!(events[0][2], (3, Field::Bytes(b"brain.Event:2")));
        assert_eq!(events[1][1], (2, Field::Varint(300)));
        assert_eq!(events[1][2], (7, Field::Bytes(&[1 << 3, 1])));
        assert_eq!(events[2][1], (2, Field::Varint(300)));
        assert!(matches!(events[3][0], (1, Field::Fixed64(time)) if f64::from_le_bytes(time) > 1.5e9));
        let (5, Field::Bytes(summary)) = events[3][2] else { panic!("{:?}", events[3]) };
        let values: Vec<_> = fields(summary)
            .into_iter()
            .map(|(field, value)| {
                let Field::Bytes(value) = value else { panic!("{value:?}") };
                (field, fields(value))
            })
            .collect();
        let entry = |tag: &'static str, value: f32| {
            (1, vec![(1, Field::Bytes(tag.as_bytes())), (2, Field::Fixed32(value.to_le_bytes()))])
        };
        assert_eq!(values, [entry("a", 0.25), entry("b", -3.0)]);
    }

    #[test]
    fn two_parts_of_a_run_have_two_files() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventFile::create(folder.path(), 1).unwrap();
        let second = EventFile::create(folder.path(), 5).unwrap();
        assert!(first.path < second.path);
    }
}
