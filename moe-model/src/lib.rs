//! Mixture-of-Experts decoder layers and pipeline stages, with explicit forward and backward, under any folding.
//!
//! A [`ModelConfig`] has the keys of a Hugging Face `config.json` of a Mixtral-like model. A [`DecoderStage`] is what one
//! rank runs of it: a pipeline stage, or one of several virtual ones, sharded over tensor parallelism (with sequence parallelism) outside of the experts,
//! over expert and expert tensor parallelism inside.
//!
//! - **Layers hold no tensors.** One [`ParamStore`](params::ParamStore) per rank owns weights and gradients, flat by reduction
//!   group; layers hold ids. What is lent to each call (device, communicators, parameters, micro-batches) is one [`Cx`].
//! - **Everything about a parameter follows from its placement** ([`params`]): this rank's block, its starting values,
//!   over which ranks its gradient is summed and its optimizer state cut, who counts it in a norm. There is no list of
//!   expert parameters.
//! - **Backward is written out** ([`Layer`]): what is kept from forward to the input gradient, and from there to the
//!   weight gradients, are values that the caller owns. So any number of micro-batches are in flight and a schedule may
//!   delay weight gradients.
//! - [`TypedStage`] is a [`moe_pipeline::Stage`] and [`CommTransport`] a [`moe_pipeline::Transport`]: any validated
//!   schedule runs it, overlaps layer by layer in the orders that [`DecoderStage::weave`] makes.
//!
//! The README runs forward and backward; here is what one rank of eight holds, known without a device or a second rank:
//!
//! ```
//! use moe_kernels::Cpu;
//! use moe_model::params::ParamLayoutBuilder;
//! use moe_model::{DecoderStage, Execution, ModelConfig, PipelineLayout};
//! use moe_topology::{Attention, Expert, Folding, Mapping};
//!
//! let config: ModelConfig = serde_json::from_str(
//!     r#"{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
//!         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}"#,
//! )?;
//! config.check()?;
//!
//! // Attention: TP2 × DP2 × PP2. Experts: EP4 × PP2.
//! let mapping = Mapping { world_size: 8, tp: 2, pp: 2, ep: 4, ..Mapping::default() };
//! let folding = Folding::new(config.split_tp(mapping))?;
//!
//! // Rank 5: the second of four ranks of the last stage.
//! let mut params = ParamLayoutBuilder::new(&folding, 5);
//! let layout = PipelineLayout::even(config.num_hidden_layers, 2, 1)?;
//! let stages = DecoderStage::of_rank(&mut params, &config, Execution::default(), &layout)?;
//! assert_eq!(DecoderStage::moe_stats(&stages, &Cpu::new(1))?.layers(), [1]);
//!
//! let layout = params.build();
//! let find = |name: &str| {
//!     layout.buckets().iter().find_map(|b| Some((b, b.parts.iter().find(|part| part.name == name)?)))
//! };
//! // The second half of the query heads, and the same half on the other data-parallel rank:
//! let (bucket, q) = find("model.layers.1.self_attn.q_proj.weight").expect("it is of stage 1");
//! assert_eq!((q.dims, &q.rows, &q.cols), ([64, 64], &(32..64), &(0..64)));
//! assert_eq!(bucket.group, (Attention::CP | Attention::DP).into());
//! // Two whole experts of eight, and nobody else has them:
//! let (bucket, w1) = find("model.layers.1.block_sparse_moe.experts.3.w1.weight").expect("expert 3 is here");
//! assert_eq!((w1.dims, &w1.rows), ([96, 64], &(0..96)));
//! assert_eq!(bucket.group, Expert::EDP.into());
//! assert!(find("model.layers.1.block_sparse_moe.experts.4.w1.weight").is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # When not to use it
//!
//! - To serve many requests: [`DecoderStage::extend`] continues sequences of one length with a [`KvCache`]; nothing batches
//!   requests or pages their memory.
//! - For a new architecture by composition of ready-made autograd operations: there is no tape. A new layer is a [`Layer`]
//!   with three functions.
//! - Where the optimizer, data and checkpoints are wanted too: those are in `moe-train`.
//!
//! A sliding window with ring attention is not built yet.

#![forbid(unsafe_code)]

pub mod attention;
pub mod axes;
pub mod bias;
pub mod block;
pub mod cache;
pub mod capacity;
pub mod config;
pub mod context;
pub mod cx;
pub mod dense;
pub mod embedding;
pub mod error;
pub mod execution;
pub mod expert_bias;
pub mod expert_mlp_bias;
pub mod forced;
pub mod head;
pub mod head_norm;
pub mod hf;
pub mod latent;
pub mod layer;
pub mod loss;
pub mod moe;
pub mod norm;
pub mod params;
pub mod pipeline;
pub mod projection_norm;
pub mod projections;
pub mod qkv;
pub mod recompute;
pub mod rope;
pub mod shared;
pub mod stage;
pub mod tokens;
pub mod transport;

pub use block::Block;
pub use cache::KvCache;
pub use capacity::{DropUnit, ExpertCapacity};
pub use config::ModelConfig;
pub use cx::{Choices, Cx, MicroBatch, Mode, MoeStats, Objective, Recorded, RecordedRouting, Stats};
pub use error::{Error, Result};
pub use execution::Execution;
pub use forced::ForcedRouting;
pub use layer::{Hidden, Layer};
pub use loss::LossSum;
pub use pipeline::PipelineLayout;
pub use recompute::{RecomputeModule, RecomputeModules};
pub use rope::RopeTable;
pub use stage::{CountingStage, DecoderStage, TypedStage};
pub use transport::{Activation, CommTransport};

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
