//! `moe-train export`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use moe_model::hf::FloatType;

use crate::Result;
use crate::checkpoint::{ExportOptions, export};
use crate::run::open_weights;

/// Write a Hugging Face folder with the weights of a checkpoint, which transformers loads.
#[derive(Debug, Args)]
pub struct Export {
    /// The folder of a checkpoint, of a run (its newest checkpoint), or of the Hugging Face hub.
    checkpoint: PathBuf,
    /// The folder to make.
    dir: PathBuf,
    /// Type of the weights; unless given, that of the folder they came from, or else their own.
    #[arg(long, value_enum)]
    dtype: Option<FileDType>,
    /// Bytes of tensors in a file, at most, as in 5GB or 500MB.
    #[arg(long, value_name = "BYTES", default_value = "5GB", value_parser = bytes)]
    max_shard_size: u64,
}

/// A type of floats in files of the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FileDType {
    F64,
    F32,
    Bf16,
    F16,
}

impl Export {
    pub fn run(self) -> Result<()> {
        let Export { checkpoint, dir, dtype, max_shard_size } = self;
        let dtype = dtype.map(|dtype| match dtype {
            FileDType::F64 => FloatType::F64,
            FileDType::F32 => FloatType::F32,
            FileDType::Bf16 => FloatType::Bf16,
            FileDType::F16 => FloatType::F16,
        });
        export(&open_weights(&checkpoint)?, &dir, ExportOptions { dtype, max_shard_size })?;
        println!("{}", dir.display());
        Ok(())
    }
}

/// A number of bytes, with a power of 1000 if need be.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000), ("", 1)];
    let size = units.into_iter().find_map(|(unit, factor)| {
        let number: u64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        number.checked_mul(factor)
    });
    size.filter(|&size| size > 0)
        .ok_or_else(|| "a number of bytes above 0 is needed, as in 5GB, 500MB or 4096".to_owned())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_have_units() {
        for (text, size) in [("5GB", 5_000_000_000), ("12 MB", 12_000_000), ("3KB", 3_000), ("4096", 4096)] {
            assert_eq!(bytes(text), Ok(size));
        }
        for text in ["", "0", "-1", "5TB", "99999999999999GB", "1.5GB", "GB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
