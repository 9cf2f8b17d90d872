//! Mixture-of-Experts decoder layers and pipeline stages.

#![forbid(unsafe_code)]

pub mod attention;
pub mod axes;
pub mod block;
pub mod config;
pub mod cx;
pub mod embedding;
pub mod error;
pub mod head;
pub mod layer;
pub mod moe;
pub mod norm;
pub mod params;
pub mod rope;
pub mod stage;
pub mod transport;

pub use block::Block;
pub use config::ModelConfig;
pub use cx::{Cx, MicroBatch, MoeStats, Objective, Stats};
pub use error::{Error, Result};
pub use layer::Layer;
pub use rope::RopeTable;
pub use stage::{DecoderStage, TypedStage};
pub use transport::CommTransport;
