//! A model's logical tensors.

use moe_model::ModelConfig;
use moe_model::params::ParamLayout;

use super::groups::TensorName;

/// All logical tensors of a model: those that one rank alone would hold. Nothing is allocated.
///
/// # Errors
/// The model's fields do not fit together.
pub fn model_tensors(model: &ModelConfig) -> moe_model::Result<Vec<TensorName>> {
    let layout = ParamLayout::of_model(model)?;
    let parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts);
    Ok(parts.map(|part| TensorName { name: part.name.clone(), vector: part.vector }).collect())
}
