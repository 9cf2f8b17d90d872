//! `moe-train trace`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::RecomputeModule;

use super::axes::Parallel;
use super::dtype::HostDType;
use crate::Result;
use crate::checkpoint::Weights;
use crate::run::open_weights;
use crate::trace::{Options, Tokens, trace};

/// Write a model's logits, losses and gradients on given tokens, as transformers computes and names them.
#[derive(Debug, Args)]
pub struct Trace {
    /// The folder of a checkpoint, of a run (its newest checkpoint), or of the Hugging Face hub.
    #[arg(long)]
    checkpoint: PathBuf,
    /// A safetensors file with `input_ids`, [batch, seq] of 64-bit integers.
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// The safetensors file to write: input_ids, logits, loss, aux_loss and, with --grads, grad.NAME of every
    /// parameter.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The type of all computation.
    #[arg(long, value_enum, default_value_t = HostDType::F64)]
    dtype: HostDType,
    /// Gradients of the loss, too.
    #[arg(long)]
    grads: bool,
    #[command(flatten)]
    parallel: Parallel,
    /// What backward makes again instead of keeping it, as in --recompute core_attn,moe_act.
    #[arg(long, value_delimiter = ',', value_parser = module)]
    recompute: Vec<RecomputeModule>,
}

fn module(name: &str) -> std::result::Result<RecomputeModule, String> {
    let all = RecomputeModule::ALL;
    let names = || all.map(RecomputeModule::name).join(", ");
    all.into_iter().find(|module| module.name() == name).ok_or_else(|| format!("must be one of {}", names()))
}

impl Trace {
    pub fn run(self) -> Result<()> {
        let weights = Arc::new(open_weights(&self.checkpoint)?);
        match self.dtype {
            HostDType::F32 => self.in_type::<f32>(&weights),
            HostDType::F64 => self.in_type::<f64>(&weights),
        }
    }

    fn in_type<T: Float<Acc = T>>(self, weights: &Arc<Weights>) -> Result<()>
    where
        Cpu: Backend<T>,
    {
        let Trace { parallel, recompute, grads, .. } = self;
        let parallel = parallel.config().unwrap_or_default();
        let tokens = Tokens::read(&self.tokens)?;
        let traced = trace::<T>(weights, &tokens, &Options { parallel, recompute, grads })?;
        traced.write(&self.out)?;
        let aux_loss = traced.aux_loss.map_or(String::new(), |aux_loss| format!(", aux_loss {aux_loss}"));
        println!("loss {}{aux_loss}", traced.loss);
        println!("trace {}", self.out.display());
        Ok(())
    }
}
