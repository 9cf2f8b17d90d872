//! The input is a `config.json`. The tensors of what is read as a model have names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_model::hf::{HubConfig, HubNames};
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = serde_json::from_slice::<Value>(data) else { return };
    let Ok(config) = HubConfig::parse(&value) else { return };
    // More would take this target's time and memory, and is what the model has.
    if config.model.num_hidden_layers.saturating_mul(config.model.num_local_experts) < 10_000 {
        HubNames::new(config.family, &config.model).expect("names of a model that was checked");
    }
});
