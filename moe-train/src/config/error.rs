//! Why a configuration was refused.

use std::path::PathBuf;

use moe_model::config::ConfigError as ModelError;

use crate::data::{BlendError, RampUpError};
use crate::durable::IoError;
use crate::optim::GroupError;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The text is not TOML.
    #[error("{origin} is not valid TOML: {message}")]
    Syntax {
        /// The file, or what the text is.
        origin: String,
        /// Line, column and reason.
        message: String,
    },
    /// A key that no setting has.
    #[error("unknown key \"{key}\" in {place}{}", hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default())]
    UnknownKey {
        /// The key.
        key: String,
        /// The table it stands in.
        place: String,
        /// Where it belongs, or the nearest name.
        hint: Option<String>,
    },
    /// A value of the wrong type, or a missing key.
    #[error("[{table}]{}: {message}", key.as_ref().map(|k| format!(" {k}")).unwrap_or_default())]
    Value {
        /// The table.
        table: &'static str,
        /// The key, if the reason does not name it.
        key: Option<String>,
        /// The reason.
        message: String,
    },
    /// An override that is not of the form `table.key=value`.
    #[error("--set {text}: write it as table.key=value, as in --set train.steps=100")]
    Override {
        /// What was given.
        text: String,
    },
    /// A value that is outside its range.
    #[error("{setting} = {value}, but it must be {allowed}")]
    Range {
        /// Table and key.
        setting: &'static str,
        /// The value.
        value: String,
        /// The range, in words that follow "must be".
        allowed: String,
    },
    /// A setting that has no meaning beside another one, or is needed by it.
    #[error("{setting} {problem} with {other}: {fix}")]
    Conflict {
        /// Table and key.
        setting: &'static str,
        /// What is wrong with it, before "with".
        problem: &'static str,
        /// The other setting and its value.
        other: String,
        /// What to do instead.
        fix: String,
    },
    /// The model was left to weights that cannot be opened.
    #[error("[model] is not complete, and train.init_checkpoint = {path:?} cannot fill it up: {what}")]
    Init {
        /// The weights.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// A setting that is known but not built.
    #[error("{setting} is not supported in training yet: {fix}")]
    Unsupported {
        /// Table, key and value.
        setting: String,
        /// What to do instead.
        fix: &'static str,
    },
    /// The batch does not grow as asked.
    #[error("[train] rampup_batch_size: {0}")]
    RampUp(#[from] RampUpError),
    /// Datasets cannot be blended so.
    #[error("[[data.blend]] {0}")]
    Blend(#[from] BlendError),
    /// The model's fields do not fit together.
    #[error("[model] {0}")]
    Model(#[from] ModelError),
    /// The model cannot be laid out.
    #[error("[model] {0}")]
    Tensors(moe_model::Error),
    /// Something to recompute means nothing.
    #[error("[train] {0}")]
    Recompute(moe_model::Error),
    /// Parameter groups do not fit the model.
    #[error("[[optimizer.groups]] {0}")]
    Groups(#[from] GroupError),
    /// Sequences cannot be cut into the parts that drop tokens.
    #[error("[train] moe_token_drop_parts: {0}")]
    DropParts(moe_model::Error),
    /// Layers do not fit the stages of the pipeline.
    #[error("[parallel] layers_per_stage: {0}")]
    Layers(moe_model::Error),
    /// The layout of the pipeline cannot be read, or does not fit.
    #[error("[parallel] pipeline_layout: {0}")]
    PipelineLayout(moe_model::Error),
    /// The pipeline's schedule does not take so many micro-batches.
    #[error("[parallel] {0}, where a step has global_batch_size / (micro_batch_size · dp) micro-batches")]
    Schedule(#[from] moe_pipeline::Error),
    /// The mapping is illegal for this world, model or batch.
    #[error("[parallel] {0}")]
    Mapping(#[from] moe_topology::Error),
}

impl ConfigError {
    /// Kernels of the host compute in f32 and f64.
    pub(crate) fn bf16_on_cpu() -> Self {
        ConfigError::Conflict {
            setting: "train.dtype = \"bf16\"",
            problem: "cannot be used",
            other: "train.device = \"cpu\"".to_owned(),
            fix: "train in f32, or set train.device = \"cuda\"".to_owned(),
        }
    }
}
