//! `moe-train import`.

use std::path::PathBuf;

use clap::Args;

use super::dtype::HostDType;
use crate::Result;
use crate::checkpoint::{import, open_hub};

/// Make a checkpoint of a Hugging Face folder, for train.init_checkpoint, eval, sample and trace.
///
/// They all take the folder itself, too; a checkpoint is hashed, and read faster by many ranks.
#[derive(Debug, Args)]
pub struct Import {
    /// The folder: config.json and safetensors files.
    dir: PathBuf,
    /// Where the folder step-0 is made.
    out: PathBuf,
    /// Type of the weights in the checkpoint.
    #[arg(long, value_enum, default_value_t = HostDType::F32)]
    dtype: HostDType,
}

impl Import {
    pub fn run(self) -> Result<()> {
        let Import { dir, out, dtype } = self;
        let weights = open_hub(&dir, &mut |skipped| eprintln!("warning: {skipped}"))?;
        let checkpoint = match dtype {
            HostDType::F32 => import::<f32>(&weights, &out)?,
            HostDType::F64 => import::<f64>(&weights, &out)?,
        };
        println!("checkpoint {}", checkpoint.display());
        Ok(())
    }
}
