//! Names and shapes of a model's parameters in transformers' modules.

use std::collections::BTreeMap;

use crate::params::{ParamLayout, Part};
use crate::{ModelConfig, Result};

/// Where a logical tensor lies in transformers' module (version 5), whose experts are fused: one parameter `gate_up_proj`
/// `[experts, 2 · inner, hidden]` and one `down_proj` `[experts, hidden, inner]` for those of a layer. The names are the
/// same in all families.
///
/// ```
/// use moe_model::ModelConfig;
/// use moe_model::hf::ModulePlace;
/// use moe_model::params::ParamLayout;
///
/// let model: ModelConfig = serde_json::from_str(
///     r#"{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}"#,
/// )?;
/// let layout = ParamLayout::of_model(&model)?;
/// let mut parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts);
/// let up = parts.find(|part| part.name == "model.layers.1.block_sparse_moe.experts.3.w3.weight").expect("of eight");
///
/// let place = ModulePlace::of(up, model.num_local_experts);
/// assert_eq!(place.name, "model.layers.1.mlp.experts.gate_up_proj");
/// assert_eq!(place.shape, [8, 2 * 96, 64]);
/// assert_eq!(place.offset, (3 * 2 + 1) * 96 * 64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModulePlace {
    /// Name of the module's parameter.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements before the first one of the logical tensor, whose elements follow each other.
    pub offset: usize,
}

impl ModulePlace {
    /// The place of the logical tensor that `part` is a block of, in a model of `experts` experts.
    pub fn of(part: &Part, experts: usize) -> Self {
        let own_shape = if part.vector { &part.dims[1..] } else { &part.dims[..] };
        let whole = |name: String| ModulePlace { name, shape: own_shape.to_vec(), offset: 0 };
        let Some((layer, rest)) = part.name.split_once(".block_sparse_moe.") else {
            return whole(part.name.clone());
        };
        let Some((expert, Projection { name, blocks, block, suffix })) = fused(rest) else {
            return whole(format!("{layer}.mlp.{rest}"));
        };
        let mut shape = [&[experts], own_shape].concat();
        shape[1] *= blocks;
        ModulePlace {
            name: format!("{layer}.mlp.experts.{name}{suffix}"),
            shape,
            offset: (expert * blocks + block) * part.dims[0] * part.dims[1],
        }
    }

    /// The shapes of all parameters of a model's module by name: one where embedding and head are tied.
    ///
    /// # Errors
    /// The model's fields do not fit together.
    pub fn shapes(model: &ModelConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        let layout = ParamLayout::of_model(model)?;
        let parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts);
        let places = parts.map(|part| ModulePlace::of(part, model.num_local_experts));
        Ok(places.map(|place| (place.name, place.shape)).collect())
    }
}

/// A projection of an expert: block `block` of the `blocks` with which it shares a parameter.
struct Projection {
    name: &'static str,
    blocks: usize,
    block: usize,
    suffix: &'static str,
}

/// The expert and projection of `experts.E.w1.weight` and the like.
fn fused(name: &str) -> Option<(usize, Projection)> {
    let (expert, rest) = name.strip_prefix("experts.")?.split_once('.')?;
    let (projection, kind) = rest.split_once('.')?;
    let (name, blocks, block) = match projection {
        "w1" => ("gate_up_proj", 2, 0),
        "w3" => ("gate_up_proj", 2, 1),
        "w2" => ("down_proj", 1, 0),
        _ => return None,
    };
    let suffix = if kind == "bias" { "_bias" } else { "" };
    Some((expert.parse().ok()?, Projection { name, blocks, block, suffix }))
}
