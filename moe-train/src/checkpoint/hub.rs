//! Folders of the Hugging Face hub, as weights.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use moe_model::hf::{HubConfig, HubFolder, HubNames, WeightsError};
use serde_json::Value;

use super::Weights;
use crate::durable::Context;
use crate::{Error, Result};

/// What is carried along.
const CARRIED: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

pub(super) const CONFIG: &str = "config.json";

/// The longest `config.json` that is read.
const LONGEST_CONFIG: u64 = 1 << 24;

/// Whether a folder is one of the hub, and not of a checkpoint or a run.
pub fn is_hub_folder(path: &Path) -> bool {
    path.join(CONFIG).is_file()
}

/// Opens the weights of a folder of the hub. Only `config.json` and the headers of its files are read; what is skipped is
/// told to `warn`.
///
/// # Errors
/// The configuration is of no family that is known, or has something that would change the mathematics and is not
/// supported; files and tensors are not exactly those of the model.
pub fn open_hub(path: &Path, warn: &mut dyn FnMut(&str)) -> Result<Weights> {
    let config = read_config(path)?;
    let HubConfig { family, model, next_token_layers, .. } = HubConfig::parse(&config)?;
    let names = HubNames::new(family, &model)?.with_next_token_layers(next_token_layers);
    let folder = HubFolder::open(path, names)?;
    folder.skipped().iter().for_each(|skipped| warn(skipped));
    Weights::of_hub(folder, config, model)
}

/// The `config.json` of a folder.
///
/// # Errors
/// It cannot be read, or is no JSON.
pub fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join(CONFIG);
    let mut text = Vec::new();
    let mut read = || File::open(&path)?.take(LONGEST_CONFIG + 1).read_to_end(&mut text);
    read().map_err(|source| WeightsError::Io { action: "read", path: path.clone(), source })?;
    let malformed = |what: String| Error::HubConfigFile { path: path.clone(), what };
    if text.len() as u64 > LONGEST_CONFIG {
        return Err(malformed(format!("has more than {LONGEST_CONFIG} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| malformed(format!("is malformed: {error}")))
}

/// Copies what is carried along from `from` to the folder `to`, which is made if there is any of it.
pub(crate) fn copy_side_files(from: &Path, to: &Path) -> Result<()> {
    for name in CARRIED {
        let (source, copy) = (from.join(name), to.join(name));
        if source.is_file() {
            fs::create_dir_all(to).context("create", to)?;
            fs::copy(&source, &copy).context("copy", &source)?;
        }
    }
    Ok(())
}
