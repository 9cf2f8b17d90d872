//! `moe-train diff`.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::diff::{DiffError, Tensors, compare};

/// Compare two sets of tensors: safetensors files, folders of the hub, or checkpoints.
///
/// Exits with status 1 if a tensor differs by more than the tolerance, or if one side lacks it.
#[derive(Debug, Args)]
pub struct Diff {
    /// A safetensors file, or the folder of a model of the hub, of a checkpoint or of a run (its newest checkpoint).
    a: PathBuf,
    /// Another one.
    b: PathBuf,
    /// How much of its largest |b| a tensor may differ by, whatever its types; 0 asks for the same types and bits.
    #[arg(long, default_value_t = 0.0, value_parser = tolerance)]
    tolerance: f64,
    /// Tensors to show, the worst first.
    #[arg(long, default_value_t = 20)]
    limit: usize,
}

fn tolerance(text: &str) -> std::result::Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "must be a number".to_owned())?;
    if number >= 0.0 { Ok(number) } else { Err("must be at least 0".to_owned()) }
}

impl Diff {
    pub fn run(self) -> Result<()> {
        let Diff { a, b, tolerance, limit } = self;
        let comparison = compare(&Tensors::open(&a)?, &Tensors::open(&b)?)?;
        print!("{}", comparison.table(tolerance, limit));
        match comparison.differing(tolerance) {
            0 => Ok(()),
            differing => {
                let all = comparison.tensors.len() + comparison.only_a.len() + comparison.only_b.len();
                Err(DiffError::Differ { differing, all }.into())
            }
        }
    }
}
