//! `moe-train checkpoint`.

use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};

use crate::checkpoint::container::{Checkpoint as Opened, Listed, list};
use crate::checkpoint::upcycle::{Plan, WeightScaling, upcycle};
use crate::config::RunConfig;
use crate::run::{checkpoints_of, open_checkpoint};
use crate::{Error, Result};

/// Look into checkpoints, and make one of another.
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
    /// Make a checkpoint of a model with experts from that of a dense model, for train.init_checkpoint.
    Upcycle {
        /// The folder of the dense model's checkpoint, or of its run (the newest one).
        dense: PathBuf,
        /// Where the folder step-0 is made.
        out: PathBuf,
        /// The configuration of the run with experts, TOML.
        #[arg(long)]
        config: PathBuf,
        /// Override a setting of it, as in --set train.seed=1; may be repeated.
        #[arg(long, value_name = "TABLE.KEY=VALUE")]
        set: Vec<String>,
        /// Which projections of the experts grow so that their sum is as large as the dense network's output.
        #[arg(long, value_enum, default_value_t = Scaling::Published)]
        scaling: Scaling,
        /// A checkpoint, or a run (its newest one), whose routers to take; at random, from train.seed, unless given.
        #[arg(long, value_name = "CHECKPOINT")]
        router: Option<PathBuf>,
    },
}

/// Which of an expert's projections carry the factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scaling {
    /// Gate, up and down, each its cube root (arXiv 2410.07524).
    Published,
    /// Up and down, each its square root: the dense model's function exactly, where weights are normalised.
    Exact,
}

impl Checkpoint {
    pub fn run(self) -> Result<()> {
        match self {
            Checkpoint::Ls { path } => {
                if let Some(root) = checkpoints_of(&path) {
                    return list_all(&root);
                }
                for tensor in Opened::open(&path)?.tensors() {
                    let [rows, cols] = tensor.dims;
                    println!("{:5} {} [{rows}, {cols}]  {}", tensor.kind, tensor.dtype, tensor.name);
                }
                Ok(())
            }
            Checkpoint::Verify { path } => match checkpoints_of(&path) {
                Some(root) => verify(list(&root)?.into_iter().map(|listed| listed.path)),
                None => verify([path].into_iter()),
            },
            Checkpoint::Upcycle { dense, out, config, set, scaling, router } => {
                let config = RunConfig::load(&config, &set)?;
                let scaling = match scaling {
                    Scaling::Published => WeightScaling::Published,
                    Scaling::Exact => WeightScaling::Exact,
                };
                let router = router.as_deref().map(open_checkpoint).transpose()?;
                let dense = open_checkpoint(&dense)?;
                let (path, plan) = upcycle(&dense, &config, scaling, router.as_ref(), &out)?;
                let Plan { granularity, copies, scale, .. } = plan;
                println!(
                    "{} experts in each layer of experts: {copies} copies of the dense network in {granularity} slices, \
                     outputs times {scale:.4}",
                    copies * granularity
                );
                println!("checkpoint {}", path.display());
                Ok(())
            }
        }
    }
}

fn list_all(root: &Path) -> Result<()> {
    for Listed { step, path, checkpoint } in list(root)? {
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
