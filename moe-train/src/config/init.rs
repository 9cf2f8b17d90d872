//! A `[model]` that is left to the weights of `train.init_checkpoint`.

use std::path::Path;

use moe_model::ModelConfig;
use toml::{Table, Value};

use super::ConfigError;
use crate::run::model_of;

/// Two ways to say the same: a key of one is not filled up with that of the other.
const AUX_LOSSES: [&str; 2] = ["router_aux_loss_coef", "router_aux_losses"];

/// Fills `[model]` up from the model of `train.init_checkpoint`, unless it has all that it must have. Whether the keys that
/// were given agree with the weights is seen when these are opened.
pub(super) fn complete_model(root: &mut Table) -> Result<(), ConfigError> {
    let Some(path) = root.get("train").and_then(|train| train.get("init_checkpoint")).and_then(Value::as_str)
    else {
        return Ok(());
    };
    let given = match root.get("model") {
        None => Table::new(),
        Some(Value::Table(given)) => given.clone(),
        // Refused when it is read.
        Some(_) => return Ok(()),
    };
    if given.clone().try_into::<ModelConfig>().is_ok() {
        return Ok(());
    }
    let refused = |what: String| ConfigError::Init { path: path.into(), what };
    let model = model_of(Path::new(path)).map_err(|error| refused(error.to_string()))?;
    let mut all = Table::try_from(&model).map_err(|error| refused(error.to_string()))?;
    if AUX_LOSSES.iter().any(|key| given.contains_key(*key)) {
        all.retain(|key, _| !AUX_LOSSES.contains(&key));
    }
    all.extend(given);
    root.insert("model".to_owned(), Value::Table(all));
    Ok(())
}
