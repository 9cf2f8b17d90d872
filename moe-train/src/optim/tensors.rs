//! A model's logical tensors.

use moe_model::params::{ParamLayout, ParamLayoutBuilder};
use moe_model::{DecoderStage, Execution, ModelConfig, PipelineLayout};
use moe_topology::{Folding, Mapping};

use super::groups::TensorName;

/// All logical tensors of a model: those that one rank alone would hold. Nothing is allocated.
///
/// # Errors
/// The model's fields do not fit together.
pub fn model_tensors(model: &ModelConfig) -> moe_model::Result<Vec<TensorName>> {
    let layout = whole_layout(model)?;
    let parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts);
    Ok(parts.map(|part| TensorName { name: part.name.clone(), vector: part.vector }).collect())
}

/// The parameters of a whole model, as one rank alone would hold them. Nothing is allocated.
///
/// # Errors
/// The model's fields do not fit together.
pub(crate) fn whole_layout(model: &ModelConfig) -> moe_model::Result<ParamLayout> {
    let one = Folding::new(Mapping::default())?;
    let mut layout = ParamLayoutBuilder::new(&one, 0);
    let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
    DecoderStage::of_rank(&mut layout, model, Execution::default(), &whole)?;
    Ok(layout.build())
}
