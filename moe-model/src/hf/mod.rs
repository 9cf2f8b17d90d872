//! Models of the Hugging Face hub: their configurations, and their weights in safetensors files, under the names of their
//! family.
//!
//! [`HubConfig`] reads a `config.json`. A folder of the hub has one tensor per expert and matrix, in one file or in shards with an index. [`HubNames`] says for
//! every logical tensor of a model what it is called there; [`HubFolder`] reads blocks of a folder that has exactly those;
//! [`WritePlan`] writes one.
//!
//! ```
//! use moe_model::ModelConfig;
//! use moe_model::hf::{Family, FloatType, HubFolder, HubNames, WeightsError, WritePlan};
//!
//! let model: ModelConfig = serde_json::from_str(
//!     r#"{"vocab_size": 16, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
//!         "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}"#,
//! )?;
//! let names = HubNames::new(Family::Olmoe, &model)?;
//!
//! // All ones, in bf16, a new file every kilobyte.
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! let plan = WritePlan::new(names.tensors().iter().map(|tensor| (tensor, FloatType::Bf16)), 1024);
//! plan.write(folder, |tensor, sink| sink.put(&vec![1.0f32; tensor.len()]))?;
//!
//! // One rank's columns of one expert, as the layout names it.
//! let opened = HubFolder::open(folder, names)?;
//! let block = opened.read::<f64>("model.layers.0.block_sparse_moe.experts.1.w2.weight", 0..8, 3..6)?;
//! assert_eq!(block, [1.0; 24]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod error;
mod family;
mod float;
mod folder;
mod header;
mod index;
mod module;
mod names;
mod write;

pub use config::{HubConfig, HubConfigError};
pub use error::WeightsError;
pub use family::Family;
pub use float::FloatType;
pub use folder::{HubFolder, is_hub_folder, tensor_files};
pub use header::{StoredTensor, TensorFile};
pub use index::ShardIndex;
pub use module::ModulePlace;
pub use names::{HubName, HubNames, HubTensor};
pub use write::{TensorSink, WritePlan};
