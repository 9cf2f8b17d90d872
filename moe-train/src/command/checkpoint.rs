//! `moe-train checkpoint`.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use crate::checkpoint::container::{Checkpoint as Opened, Listed, list, open_newest};
use crate::run::RunFolder;
use crate::{Error, Result};

/// Look into checkpoints.
#[derive(Debug, Subcommand)]
pub enum Checkpoint {
    /// List the checkpoints of a run, or the tensors of one checkpoint.
    Ls {
        /// The folder of a run or of a checkpoint.
        path: PathBuf,
    },
    /// Read every byte of a checkpoint, or of all checkpoints of a run, and compare checksums.
    Verify {
        /// The folder of a run or of a checkpoint.
        path: PathBuf,
    },
}

impl Checkpoint {
    pub fn run(self) -> Result<()> {
        match self {
            Checkpoint::Ls { path } if is_run(&path) => list_run(&path),
            Checkpoint::Ls { path } => {
                for tensor in Opened::open(&path)?.tensors() {
                    let [rows, cols] = tensor.dims;
                    println!("{:5} {} [{rows}, {cols}]  {}", tensor.kind, tensor.dtype, tensor.name);
                }
                Ok(())
            }
            Checkpoint::Verify { path } if is_run(&path) => {
                verify(list(&RunFolder::new(&path).checkpoints())?.into_iter().map(|listed| listed.path))
            }
            Checkpoint::Verify { path } => verify([path].into_iter()),
        }
    }
}

/// Opens a checkpoint, or the newest whole one of a run.
pub(super) fn open(path: &Path) -> Result<Opened> {
    if is_run(path) {
        let folder = RunFolder::new(path).checkpoints();
        return Ok(open_newest(&folder, &mut |fault| eprintln!("warning: skipped: {fault}"))?);
    }
    Ok(Opened::open(path)?)
}

fn is_run(path: &Path) -> bool {
    RunFolder::new(path).checkpoints().is_dir()
}

fn list_run(path: &Path) -> Result<()> {
    for Listed { step, path, checkpoint } in list(&RunFolder::new(path).checkpoints())? {
        match checkpoint {
            Ok(found) => println!(
                "step {step:>8}  {:>12} bytes from {} ranks  {}",
                found.bytes(),
                found.writers(),
                path.display()
            ),
            Err(fault) => println!("step {step:>8}  not whole: {fault}"),
        }
    }
    Ok(())
}

/// Reports every fault; the first one is the error.
fn verify(checkpoints: impl Iterator<Item = PathBuf>) -> Result<()> {
    let mut first = None;
    for path in checkpoints {
        let faults = match Opened::open(&path) {
            Ok(checkpoint) => checkpoint.verify(),
            Err(fault) => vec![fault],
        };
        if faults.is_empty() {
            println!("{}: whole", path.display());
        }
        for fault in faults {
            eprintln!("{fault}");
            first.get_or_insert(fault);
        }
    }
    first.map_or(Ok(()), |fault| Err(Error::Checkpoint(fault)))
}
