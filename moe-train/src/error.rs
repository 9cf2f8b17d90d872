//! The crate's error type.

use std::path::PathBuf;

use moe_comm::WorldError;
use moe_model::hf::{HubConfigError, WeightsError};
use moe_pipeline::ExecuteError;

use crate::checkpoint::container::CheckpointError;
use crate::checkpoint::upcycle::UpcycleError;
use crate::config::ConfigError;
use crate::data::{DataError, TokenizeError};
use crate::diff::DiffError;
use crate::durable::IoError;
use crate::eval::EvalError;
use crate::infer::InferError;
use crate::metrics::MetricsError;
use crate::optim::GroupError;
use crate::run::ProcessError;
use crate::trace::TraceError;

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data is wrong.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A text has no tokens, or tokens no text.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// A text cannot be continued.
    #[error(transparent)]
    Infer(#[from] InferError),
    /// A text cannot be evaluated.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// A checkpoint is wrong, or cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights of a folder of the hub are wrong, or cannot be written.
    #[error(transparent)]
    HubWeights(#[from] WeightsError),
    /// The configuration of a folder of the hub was refused, or no family of the hub has a model.
    #[error(transparent)]
    HubConfig(#[from] HubConfigError),
    /// A file of configuration of the hub cannot be read.
    #[error("{} {what}", path.display())]
    HubConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A checkpoint cannot become one of another model.
    #[error(transparent)]
    Upcycle(#[from] UpcycleError),
    /// A trace was refused, or cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Tensors cannot be compared, or differ.
    #[error(transparent)]
    Diff(#[from] DiffError),
    /// A file of the run cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A rank failed, and with it the run.
    #[error(transparent)]
    World(#[from] WorldError),
    /// Ranks as processes were refused, or one failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// What one of several processes met.
    #[error("rank {rank}: {source}")]
    OfRank {
        /// The rank of this process.
        rank: usize,
        /// It is the failure of another rank, and the process that started them says it.
        told: bool,
        /// What it is.
        source: Box<Error>,
    },
    /// The folder of a run holds one already.
    #[error(
        "{} already holds a run: continue it with --resume, or choose another folder with --set train.output=FOLDER",
        path.display()
    )]
    RunExists {
        /// The folder.
        path: PathBuf,
    },
    /// A run cannot go on with another value of a setting that its numbers or the order of its samples depend on.
    #[error(
        "{key} was {then} when the checkpoint was written and is {now} now: set it back to {then}, or start a new run"
    )]
    Resume {
        /// The setting.
        key: &'static str,
        /// Its value then.
        then: String,
        /// Its value now.
        now: String,
    },
    /// A routing was recorded for something else than what it is to be replayed in.
    #[error(
        "the routing in {} cannot be replayed: {key} was {recorded} when it was recorded and is {now} now", path.display()
    )]
    Replay {
        /// The recorded step.
        path: PathBuf,
        /// What differs.
        key: String,
        /// Its value then.
        recorded: String,
        /// Its value now.
        now: String,
    },
    /// Metrics cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The run was interrupted, after it had saved.
    #[error("interrupted after step {step}; {}", match checkpoint {
        Some(checkpoint) => format!("the checkpoint is {}: continue with --resume", checkpoint.display()),
        None => "nothing was saved, since train.keep_checkpoints = 0".to_owned(),
    })]
    Interrupted {
        /// The last step that was made.
        step: u64,
        /// What was saved, unless nothing is.
        checkpoint: Option<PathBuf>,
    },
    /// Too many steps in a row whose loss or gradient is not finite.
    #[error(
        "the loss or the gradient of step {step} is not finite{}; its samples are {}. \
         {}; lower the learning rate, or let train.non_finite = \"skip\" with a train.non_finite_limit above {skipped} pass over it",
        if *skipped > 0 { format!(", nor were those of the {skipped} before it") } else { String::new() },
        samples.iter().map(|(path, of)| format!("{of:?} of {}", path.display())).collect::<Vec<_>>().join(", "),
        match checkpoint {
            Some(checkpoint) => {
                format!("The state before it is {}: --resume makes the step again", checkpoint.display())
            }
            None => "Nothing was saved, since train.keep_checkpoints = 0".to_owned(),
        }
    )]
    NonFinite {
        /// The step.
        step: u64,
        /// Steps in a row that were skipped before it.
        skipped: u64,
        /// Its samples, by the file that they are of.
        samples: Vec<(PathBuf, Vec<u64>)>,
        /// What was saved, unless nothing is: the state before the step.
        checkpoint: Option<PathBuf>,
    },
    /// Ranks did not say what they agreed to.
    #[error("{what}")]
    Protocol {
        /// What was said.
        what: &'static str,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] moe_kernels::Error),
    /// A communicator failed.
    #[error(transparent)]
    Comm(#[from] moe_comm::Error),
    /// The model failed outside of the pipeline.
    #[error(transparent)]
    Model(#[from] moe_model::Error),
    /// Parameter groups do not fit the model.
    #[error("optimizer.groups: {0}")]
    Groups(#[from] GroupError),
    /// The mapping is illegal.
    #[error(transparent)]
    Topology(#[from] moe_topology::Error),
    /// The schedule is illegal.
    #[error(transparent)]
    Schedule(#[from] moe_pipeline::Error),
    /// Stages are on other ranks than the schedule has them on.
    #[error(
        "{schedule} has stages on other ranks than the pipeline's layout: give it PipelineLayout::placed(Named::placement)"
    )]
    StagePlacement {
        /// The schedule.
        schedule: moe_pipeline::generate::Named,
    },
    /// A step of the pipeline failed.
    #[error(transparent)]
    Pipeline(#[from] ExecuteError<moe_model::Error, moe_model::Error>),
}
