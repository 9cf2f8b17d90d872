//! The names of a model's tensors in the files of its family.

use std::collections::BTreeMap;

use super::Family;
use crate::params::ParamLayout;
use crate::{ModelConfig, Result};

/// A tensor of a model: as it is named and shaped here, and as in files of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubTensor {
    /// Its name in a [layout](ParamLayout).
    pub name: String,
    /// Its name in the files.
    pub hub: String,
    /// Its shape here, `[rows, cols]`; a vector is `[1, n]`.
    pub dims: [usize; 2],
    /// Its shape in the files.
    pub shape: Vec<usize>,
    /// Whether it is a buffer and no parameter.
    pub buffer: bool,
}

impl HubTensor {
    /// Its elements.
    pub fn len(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// True if it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a name in a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubName<'a> {
    /// A tensor of the model.
    Tensor(&'a HubTensor),
    /// Of a layer that predicts further tokens (DeepSeek-V3's multi-token prediction), behind the model's layers.
    NextTokenLayer(usize),
    /// Known, and made anew by every program: inverse frequencies of rotary embeddings, in files of old versions.
    Computed,
    /// Nothing that is known, and why it might be there, in words that follow the message.
    Unknown(&'static str),
}

/// All tensors of a model under both names: one for one.
///
/// ```
/// use moe_model::ModelConfig;
/// use moe_model::hf::{Family, HubNames};
///
/// let model: ModelConfig = serde_json::from_str(
///     r#"{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
///         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}"#,
/// )?;
/// let names = HubNames::new(Family::Qwen3Moe, &model)?;
/// let gate = names.tensor("model.layers.1.block_sparse_moe.experts.3.w1.weight").expect("it has eight experts");
/// assert_eq!(gate.hub, "model.layers.1.mlp.experts.3.gate_proj.weight");
/// assert_eq!(gate.shape, [96, 64]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct HubNames {
    /// In the order of the layers.
    tensors: Vec<HubTensor>,
    by_name: BTreeMap<String, usize>,
    by_hub: BTreeMap<String, usize>,
    layers: usize,
    next_token_layers: usize,
}

impl HubNames {
    /// Those of a model in files of `family`.
    ///
    /// # Errors
    /// The model's fields do not fit together.
    pub fn new(family: Family, model: &ModelConfig) -> Result<Self> {
        let layout = ParamLayout::of_model(model)?;
        let parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts).map(|part| HubTensor {
            name: part.name.clone(),
            hub: hub_name(family, &part.name),
            dims: part.dims,
            shape: if part.vector { vec![part.dims[1]] } else { part.dims.to_vec() },
            buffer: false,
        });
        let buffers = layout.buffers().map(|(_, buffer)| HubTensor {
            name: buffer.name.clone(),
            hub: hub_name(family, &buffer.name),
            dims: [1, buffer.len],
            shape: vec![buffer.len],
            buffer: true,
        });
        let tensors: Vec<HubTensor> = parts.chain(buffers).collect();
        let index = |name: fn(&HubTensor) -> &String| {
            tensors.iter().enumerate().map(|(n, tensor)| (name(tensor).clone(), n)).collect()
        };
        Ok(HubNames {
            by_name: index(|tensor| &tensor.name),
            by_hub: index(|tensor| &tensor.hub),
            tensors,
            layers: model.num_hidden_layers,
            next_token_layers: 0,
        })
    }

    /// With so many layers behind the model's own that predict further tokens, which files may have and which are not
    /// read.
    pub fn with_next_token_layers(self, next_token_layers: usize) -> Self {
        HubNames { next_token_layers, ..self }
    }

    /// All tensors, in the order of the layers, buffers last.
    pub fn tensors(&self) -> &[HubTensor] {
        &self.tensors
    }

    /// The tensor of this name in a layout.
    pub fn tensor(&self, name: &str) -> Option<&HubTensor> {
        self.by_name.get(name).map(|&n| &self.tensors[n])
    }

    /// What `hub`, a name in a file, is.
    pub fn find(&self, hub: &str) -> HubName<'_> {
        if let Some(&n) = self.by_hub.get(hub) {
            return HubName::Tensor(&self.tensors[n]);
        }
        if hub.ends_with(".rotary_emb.inv_freq") {
            return HubName::Computed;
        }
        let layer = hub.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        if let Some(layer) = layer.and_then(|(layer, _)| layer.parse::<usize>().ok())
            && layer.checked_sub(self.layers).is_some_and(|n| n < self.next_token_layers)
        {
            return HubName::NextTokenLayer(layer);
        }
        HubName::Unknown(if hub == "lm_head.weight" {
            ": tie_word_embeddings makes the head the embedding"
        } else if hub.ends_with("_scale_inv") || hub.ends_with("_scale") {
            ": quantised weights are not read"
        } else if hub.ends_with(".experts.gate_up_proj") || hub.ends_with(".experts.down_proj") {
            ": experts are read one by one, as save_pretrained writes them"
        } else {
            ""
        })
    }
}

/// The name of a tensor of a layout in files of `family`.
fn hub_name(family: Family, name: &str) -> String {
    // Layouts use Mixtral's names.
    let inside = match family {
        Family::Mixtral => None,
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe | Family::DeepseekV3 => {
            name.split_once(".block_sparse_moe.")
        }
    };
    let Some((layer, rest)) = inside else { return name.to_owned() };
    match rest.split('.').collect::<Vec<_>>()[..] {
        ["experts", expert, projection, kind] => {
            let projection = match projection {
                "w1" => "gate_proj",
                "w3" => "up_proj",
                "w2" => "down_proj",
                other => other,
            };
            format!("{layer}.mlp.experts.{expert}.{projection}.{kind}")
        }
        _ => format!("{layer}.mlp.{rest}"),
    }
}
