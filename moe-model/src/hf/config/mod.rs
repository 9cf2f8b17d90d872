//! `config.json` of a family of the hub, as a [`ModelConfig`] and back.

mod error;
mod keys;
mod read;
mod rope;
mod write;

use serde_json::{Map, Value};

pub use error::HubConfigError;

use super::{Family, FloatType};
use crate::ModelConfig;

/// The configuration of a model of the hub.
///
/// Every key is one that is read, one that is known to change nothing that is computed, or an error: what would change the
/// mathematics and is not supported is refused by name. Spellings of several versions of transformers are accepted
/// (`num_experts`, `num_local_experts`, `n_routed_experts`; `rope_parameters`, or `rope_theta` with `rope_scaling`); if several
/// are there, they must agree.
///
/// ```
/// use moe_model::hf::{Family, HubConfig};
///
/// let mut config = serde_json::json!({
///     "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
///     "num_hidden_layers": 16, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
/// });
/// # config["num_experts"] = 8.into();
/// # config["num_experts_per_tok"] = 2.into();
/// config["clip_qkv"] = 8.0.into();
/// let refused = HubConfig::parse(&config).unwrap_err().to_string();
/// assert!(refused.starts_with("clip_qkv = 8.0 is not supported"), "{refused}");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct HubConfig {
    /// The family.
    pub family: Family,
    /// The model.
    pub model: ModelConfig,
    /// Layers behind the model's own that predict further tokens: their tensors may be in files, and are not read.
    pub next_token_layers: usize,
    /// As it was read, or made.
    config: Map<String, Value>,
}

impl HubConfig {
    /// Reads a `config.json`. A coefficient of the load-balancing loss counts if `output_router_logits` is on, over all layers
    /// together, as in transformers.
    ///
    /// # Errors
    /// It is of no family that is known; a key is missing, unknown, of the wrong type, or asks for what is not supported;
    /// two spellings of a key disagree; the fields do not fit together.
    pub fn parse(config: &Value) -> Result<Self, HubConfigError> {
        let config = config.as_object().ok_or(HubConfigError::NoObject)?;
        let (family, model, next_token_layers) = read::read(config)?;
        Ok(HubConfig { family, model, next_token_layers, config: config.clone() })
    }

    /// The configuration of a model that did not come from the hub, in the family that has it.
    ///
    /// # Errors
    /// [`HubConfigError::NoFamily`], with the first key that the nearest family has otherwise.
    pub fn of_model(model: &ModelConfig) -> Result<Self, HubConfigError> {
        let (family, config) = write::of_model(model);
        Self::of_family(family, config, model)
    }

    /// The configuration of the same model with what training changed of it: keys that act in training alone.
    ///
    /// # Errors
    /// [`HubConfigError::NoFamily`] if more than that differs.
    pub fn with_model(&self, model: &ModelConfig) -> Result<Self, HubConfigError> {
        let mut config = self.config.clone();
        if *model != self.model {
            write::aux_loss(model, &mut config);
        }
        Self::of_family(self.family, config, model)
    }

    /// Only if `config` is `model`, but for what acts in training alone.
    fn of_family(
        family: Family,
        config: Map<String, Value>,
        model: &ModelConfig,
    ) -> Result<Self, HubConfigError> {
        let made = HubConfig::parse(&Value::Object(config))?;
        let training_alone = |key: &str| ModelConfig::TRAINING_ALONE.contains(&key);
        match write::canonical(&made.model).first_difference(&write::canonical(model), training_alone) {
            None => Ok(HubConfig { model: model.clone(), ..made }),
            Some((key, there, here)) => Err(HubConfigError::NoFamily { family, key, here, there }),
        }
    }

    /// The `config.json` of files whose weights are of type `dtype`.
    pub fn to_json(&self, dtype: FloatType) -> Value {
        let mut config = self.config.clone();
        let [newest, _] = read::DTYPES;
        if read::DTYPES.iter().all(|&key| !config.contains_key(key)) {
            config.insert(newest.to_owned(), Value::Null);
        }
        for key in read::DTYPES {
            if let Some(value) = config.get_mut(key) {
                *value = Value::from(dtype.name());
            }
        }
        Value::Object(config)
    }
}
