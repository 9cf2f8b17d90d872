//! Logits, loss and gradients of one batch as transformers computes them, under any folding: *Trace* of
//! `docs/semantics.md`.
//!
//! What comes out does not depend on the folding, so it is also how one folding is held against another. Names and shapes of
//! the gradients are those of transformers' modules ([`ModulePlace`](moe_model::hf::ModulePlace)).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use moe_train::config::ParallelConfig;
//! use moe_train::run::open_weights;
//! use moe_train::trace::{Options, Tokens, trace};
//!
//! let weights = Arc::new(open_weights("runs/first".as_ref())?);
//! let tokens = Tokens::read("tokens.safetensors".as_ref())?; // input_ids [batch, seq], i64
//! let parallel = ParallelConfig { world_size: 4, tp: 2, ep: 4, ..ParallelConfig::default() };
//! let traced = trace::<f64>(&weights, &tokens, &Options { parallel, grads: true, ..Options::default() })?;
//! println!("loss {}", traced.loss);
//! traced.write("trace.safetensors".as_ref())?;
//! # Ok::<(), moe_train::Error>(())
//! ```

mod error;
mod gather;
mod rank;
mod tokens;

use std::sync::Arc;

use moe_comm::ThreadWorld;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::config::{AuxLoss, AuxLossScope, ModelConfig};
use moe_model::{Execution, RecomputeModule, RecomputeModules};

pub use error::TraceError;
pub use gather::{Trace, TracedTensor};
pub use tokens::Tokens;

use crate::Result;
use crate::checkpoint::Weights;
use crate::config::{ConfigError, ParallelConfig};
use crate::passes::{DEADLINE, Passes};
use crate::run::threads;

/// How a trace is computed, and how much of it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// How ranks are folded.
    pub parallel: ParallelConfig,
    /// What backward makes again.
    pub recompute: Vec<RecomputeModule>,
    /// Whether gradients are wanted beside logits and losses.
    pub grads: bool,
}

/// A batch under a folding, the same on all ranks.
#[derive(Debug)]
struct Plan {
    /// One micro-batch on every data-parallel rank, the last sequences padding where DP does not divide the batch.
    passes: Passes,
    tokens: Tokens,
    /// The coefficient of the load-balancing loss, if the model has one.
    aux_coef: Option<f64>,
    grads: bool,
}

impl Plan {
    fn new(model: &ModelConfig, tokens: &Tokens, options: &Options) -> Result<Self> {
        tokens.check(model.vocab_size)?;
        let (aux_coef, parallel) = (model_aux_coef(model), &options.parallel);
        let model = as_transformers(model, aux_coef);
        let execution = Execution {
            dispatcher: parallel.dispatcher.into(),
            recompute: RecomputeModules::new(&options.recompute, &model).map_err(ConfigError::Recompute)?,
            shared_expert_overlap: false,
        };
        let batch = |_, dp| tokens.batch.div_ceil(dp);
        let passes = Passes::new(model, parallel, execution, tokens.length, batch)?;
        Ok(Plan { passes, tokens: tokens.clone(), aux_coef, grads: options.grads })
    }
}

/// The coefficient of the load-balancing loss over all layers, 0 or not, if the model has one.
fn model_aux_coef(model: &ModelConfig) -> Option<f64> {
    let mut losses = model.router_aux_losses.iter();
    losses.find(|loss| loss.scope == AuxLossScope::Model).map(|loss| loss.coef)
}

/// `model` with the losses that transformers knows: the load-balancing loss over all layers, or none.
fn as_transformers(model: &ModelConfig, aux_coef: Option<f64>) -> ModelConfig {
    ModelConfig {
        router_aux_loss_coef: None,
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Model, coef: aux_coef.unwrap_or(0.0) }],
        router_z_loss_coef: 0.0,
        ..model.clone()
    }
}

/// Traces `tokens` in `T`, with ranks as threads.
///
/// # Errors
/// The folding is illegal for the model, a token is none of it, the weights are damaged, or a rank fails.
pub fn trace<T: Float<Acc = T>>(
    weights: &Arc<Weights>,
    tokens: &Tokens,
    options: &Options,
) -> Result<Trace<T>>
where
    Cpu: Backend<T>,
{
    let plan = Arc::new(Plan::new(weights.model(), tokens, options)?);
    let world_size = plan.passes.folding.world_size();
    let threads = threads(world_size);
    let ranks = {
        let (plan, weights) = (plan.clone(), weights.clone());
        ThreadWorld::run(world_size, DEADLINE, move |world| {
            rank::run::<T, Cpu>(&plan, &weights, &world, Cpu::new(threads))
        })?
    };
    Trace::gather(&plan, ranks)
}
