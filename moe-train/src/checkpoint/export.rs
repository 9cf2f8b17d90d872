//! Weights into a folder of the hub.

use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::{DType, Float, bf16};
use moe_model::hf::{FloatType, HubConfig, HubNames, HubTensor, TensorSink, WritePlan};

use super::container::CheckpointError;
use super::hub::{CONFIG, copy_side_files};
use super::{HubOrigin, Weights};
use crate::Result;
use crate::config::TrainDType;
use crate::durable::{Context, rename, sync_folder, temporary_name, write_new};

/// How a folder of the hub is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// The type of all weights; unless given, each has the one in which it came from the hub, and those of a model that did
    /// not come from there their own. In bf16 a run in bf16 gives the weights that it computed with; all else is rounded to the
    /// nearest, ties to even. Biases of the choice of experts are kept in 32 bits or more, as transformers keeps them.
    pub dtype: Option<FloatType>,
    /// Bytes of tensors in a file, at most; one that is larger has a file for itself.
    pub max_shard_size: u64,
}

impl Default for ExportOptions {
    /// In the types that weights have, in files of at most 5 GB, as transformers writes them.
    fn default() -> Self {
        ExportOptions { dtype: None, max_shard_size: 5_000_000_000 }
    }
}

/// Writes `weights` to the new folder `folder`, as transformers' `save_pretrained` does: `config.json`, a tensor per expert and
/// matrix in safetensors files, an index if there are several; and what else the model came with. A model that came from the
/// hub goes back in its family, with what training changed; the context of another is that of its run. One tensor at a time is in memory.
///
/// # Errors
/// There is such a folder already; no family has this model; a weight cannot be read, is not finite, or is infinite in its
/// type; something cannot be written. There is no folder then.
pub fn export(weights: &Weights, folder: &Path, options: ExportOptions) -> Result<()> {
    if folder.try_exists().context("read", folder)? {
        return Err(CheckpointError::Exists { path: folder.to_owned() }.into());
    }
    let origin = weights.meta().hub.as_ref();
    let config = match origin {
        Some(HubOrigin { config, .. }) => HubConfig::parse(config)?.with_model(weights.model())?,
        None => HubConfig::of_model(weights.model())?,
    };
    let names = HubNames::new(config.family, weights.model())?;
    let kept = match weights.dtype() {
        DType::F64 => FloatType::F64,
        _ => FloatType::F32,
    };
    let dtype = |tensor: &HubTensor| match (options.dtype, origin) {
        (Some(asked), _) if tensor.buffer && asked.size() < 4 => FloatType::F32,
        (Some(asked), _) => asked,
        (None, Some(origin)) => *origin.other_dtypes.get(&tensor.name).unwrap_or(&origin.dtype),
        (None, None) => kept,
    };
    let plan =
        WritePlan::new(names.tensors().iter().map(|tensor| (tensor, dtype(tensor))), options.max_shard_size);
    let most = options.dtype.or(origin.map(|origin| origin.dtype)).unwrap_or(kept);

    let unfinished = Unfinished::create(folder)?;
    let trained_in_bf16 =
        weights.meta().run.as_ref().is_some_and(|run| run.config.train.dtype == TrainDType::Bf16);
    let as_trained =
        |tensor: &HubTensor| trained_in_bf16 && !tensor.buffer && dtype(tensor) == FloatType::Bf16;
    match kept {
        FloatType::F64 => plan.write(&unfinished.0, fill::<f64>(weights, as_trained)),
        _ => plan.write(&unfinished.0, fill::<f32>(weights, as_trained)),
    }?;
    let mut config = config.to_json(most);
    if let (None, Some(run)) = (origin, &weights.meta().run) {
        // Each family has a default, which is not what this model was trained on.
        config["max_position_embeddings"] = run.config.train.sequence_length.into();
    }
    let text = format!("{config:#}\n");
    write_new(&unfinished.0.join(CONFIG), text.as_bytes())?;
    if let Some(side_files) = weights.side_files() {
        copy_side_files(&side_files, &unfinished.0)?;
    }
    unfinished.finish(folder)
}

/// Gives each tensor whole, where `as_trained` says so in bf16 as a run computes with it.
fn fill<A: Float>(
    weights: &Weights,
    as_trained: impl Fn(&HubTensor) -> bool,
) -> impl FnMut(&HubTensor, &mut TensorSink<'_>) -> Result<()> {
    move |tensor, sink| {
        let [rows, cols] = tensor.dims;
        let elements = match tensor.buffer {
            true => weights.read_buffer::<A>(&tensor.name, cols)?,
            false => weights.read::<A>(&tensor.name, tensor.dims, 0..rows, 0..cols)?,
        };
        match as_trained(tensor) {
            true => {
                // Masters of bf16 are f32.
                let trained = elements.iter().map(|master| bf16::split(master.to_f64() as f32).0);
                Ok(sink.put(&trained.collect::<Vec<_>>())?)
            }
            false => Ok(sink.put(&elements)?),
        }
    }
}

/// A folder that is being written, beside its name; dropped before it is finished, it is removed.
struct Unfinished(PathBuf);

impl Unfinished {
    fn create(folder: &Path) -> Result<Self> {
        let own = temporary_name(folder);
        fs::create_dir_all(&own).context("create", &own)?;
        Ok(Unfinished(own))
    }

    /// Gives it its name.
    fn finish(self, folder: &Path) -> Result<()> {
        sync_folder(&self.0)?;
        Ok(rename(&self.0, folder)?)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone if it was finished.
        let _ = fs::remove_dir_all(&self.0);
    }
}
