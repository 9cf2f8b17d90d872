//! The `moe-train` command.

mod axes;
mod checkpoint;
mod data;
mod diff;
mod dtype;
mod eval;
mod export;
mod import;
mod sample;
mod schedule;
mod topology;
mod trace;
mod train;

use clap::{Parser, Subcommand};
use moe_kernels::Error::NotANumber;
use moe_model::Error::RouterNotANumber;
use moe_pipeline::ExecuteError;

use crate::diff::DiffError;
use crate::eval::EvalError;
use crate::infer::InferError;
use crate::run::ProcessError;
use crate::trace::TraceError;
use crate::{Error, Result};

/// Train Mixture-of-Experts Transformers under any folding of their ranks.
#[derive(Debug, Parser)]
#[command(name = "moe-train", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model as a config file says.
    Train(train::Train),
    /// Show how ranks are folded into groups.
    Topology(topology::Topology),
    /// Continue a text with a trained model.
    Sample(sample::Sample),
    /// Measure how well a model predicts text.
    Eval(eval::Eval),
    /// Write a model's logits, losses and gradients on given tokens, as transformers computes and names them.
    Trace(trace::Trace),
    /// Make a checkpoint of a Hugging Face folder.
    Import(import::Import),
    /// Write a Hugging Face folder with the weights of a checkpoint.
    Export(export::Export),
    /// Compare two sets of tensors: safetensors files, folders of the hub, or checkpoints.
    Diff(diff::Diff),
    /// Look into checkpoints, and make one of another.
    #[command(subcommand)]
    Checkpoint(checkpoint::Checkpoint),
    /// Make tokens to train on.
    #[command(subcommand)]
    Data(data::Data),
    /// Look into pipeline schedules.
    #[command(subcommand)]
    Schedule(schedule::Schedule),
}

impl Cli {
    /// Runs the command that was parsed.
    ///
    /// # Errors
    /// What went wrong, in one message; see [`exit_status`].
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Train(command) => command.run(),
            Command::Topology(command) => command.run(),
            Command::Sample(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Trace(command) => command.run(),
            Command::Import(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Diff(command) => command.run(),
            Command::Checkpoint(command) => command.run(),
            Command::Data(command) => command.run(),
            Command::Schedule(command) => command.run(),
        }
    }
}

/// What to say of an error: nothing where another process says it.
pub fn message(error: &Error) -> Option<String> {
    match error {
        Error::Process(ProcessError::Said { .. }) | Error::OfRank { told: true, .. } => None,
        error => Some(error.to_string()),
    }
}

/// The process's exit status for an error: 1 for tensors that differ, 2 for what the user asked (configuration, mapping, a run that it cannot be
/// asked of), 3 for data, 4 for checkpoints, 5 for a run that failed, 6 for one that stopped because numbers are not finite, 130
/// for one that was interrupted.
pub fn exit_status(error: &Error) -> u8 {
    match error {
        Error::Diff(DiffError::Differ { .. }) => 1,
        Error::Config(_)
        | Error::Topology(_)
        | Error::Schedule(_)
        | Error::RunExists { .. }
        | Error::Resume { .. }
        | Error::Replay { .. }
        | Error::Upcycle(_) => 2,
        Error::Process(ProcessError::Ended { status, .. } | ProcessError::Said { status, .. }) => *status,
        Error::Process(ProcessError::Start { .. } | ProcessError::Lost { .. }) => 5,
        Error::Process(_) => 2,
        Error::OfRank { source, .. } => exit_status(source),
        Error::Infer(InferError::NotFinite { .. }) => 6,
        Error::Infer(_) => 2,
        Error::Eval(EvalError::NotFinite { .. }) => 6,
        Error::Eval(
            EvalError::Empty { .. } | EvalError::NothingToPredict { .. } | EvalError::Vocabulary { .. },
        ) => 3,
        Error::Eval(_) => 2,
        Error::Data(_) | Error::Tokenize(_) => 3,
        Error::Trace(
            TraceError::Tokens { .. } | TraceError::TooShort { .. } | TraceError::Vocabulary { .. },
        ) => 3,
        Error::Checkpoint(_)
        | Error::Diff(_)
        | Error::HubWeights(_)
        | Error::HubConfig(_)
        | Error::HubConfigFile { .. } => 4,
        Error::NonFinite { .. }
        | Error::Pipeline(ExecuteError::Stage { source: RouterNotANumber { .. }, .. })
        // What a GPU found in a router's logits, returned by a later call.
        | Error::Device(NotANumber { .. })
        | Error::Model(moe_model::Error::Device(NotANumber { .. }))
        | Error::Comm(moe_comm::Error::Device(NotANumber { .. })) => 6,
        Error::Interrupted { .. } => 130,
        // What the first rank to fail met is what went wrong.
        Error::World(world) => {
            world.source.as_deref().and_then(|source| source.downcast_ref()).map_or(5, exit_status)
        }
        _ => 5,
    }
}
