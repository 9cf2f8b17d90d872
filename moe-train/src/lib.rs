//! Training Mixture-of-Experts Transformers under any folding of their ranks: data, optimizer, checkpoints, metrics, and
//! the `moe-train` command.
//!
//! | to | see |
//! |---|---|
//! | run training from a program as the command does | [`run`] |
//! | train on data of your own | [`trainer::RankTrainer`] over a [`trainer::BatchSource`], as below |
//! | read a configuration | [`config`] |
//! | turn text into samples in an order that no mapping changes | [`data`] |
//! | shard an optimizer over exactly the ranks among which a gradient is partial | [`optim`] |
//! | write and read checkpoints that know no mapping | [`checkpoint`] |
//! | take a model of the Hugging Face hub in, and hand it back | [`checkpoint::import`], [`checkpoint::export`] |
//! | continue a text | [`infer`] |
//! | measure the perplexity of texts | [`eval`] |
//! | hold a model against transformers, number by number | [`trace`], [`diff`] |
//!
//! Two steps of a tiny model on four ranks, from memory:
//!
//! ```
//! use std::time::Duration;
//!
//! use moe_comm::ThreadWorld;
//! use moe_kernels::Cpu;
//! use moe_train::config::RunConfig;
//! use moe_train::trainer::{BatchSource, RankTrainer, Sequence};
//!
//! /// The same bytes over and over.
//! struct Alphabet;
//!
//! impl BatchSource for Alphabet {
//!     fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
//!         let first = step as u32 + u as u32;
//!         Ok(vec![Sequence::unweighted((0..17).map(|i| 97 + (first + i) % 26).collect())]) // 16 inputs, 16 targets
//!     }
//! }
//!
//! // Attention: TP2 × DP2. Experts: EP4.
//! let config = RunConfig::parse(
//!     r#"
//!     [model]
//!     vocab_size = 256
//!     hidden_size = 32
//!     intermediate_size = 48
//!     num_hidden_layers = 2
//!     num_attention_heads = 4
//!     num_key_value_heads = 2
//!     num_local_experts = 4
//!     num_experts_per_tok = 2
//!
//!     [parallel]
//!     world_size = 4
//!     tp = 2
//!     ep = 4
//!
//!     [train]
//!     steps = 2
//!     global_batch_size = 4
//!     sequence_length = 16
//!     output = "unused here"
//!
//!     [data]
//!     files = ["unused here"]
//!     "#,
//!     "example",
//!     &["optimizer.lr=0.01"],
//! )?;
//! let setup = moe_train::run::setup(&config)?;
//!
//! let reports = ThreadWorld::run(4, Duration::from_secs(30), move |world| {
//!     let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, Cpu::new(1))?;
//!     (1..=2).map(|step| trainer.step(step, &Alphabet)).collect::<moe_train::Result<Vec<_>>>()
//! })?;
//! let [first, second] = &reports[0][..] else { unreachable!("two steps") };
//! assert!(second.loss < first.loss);
//! assert_eq!(reports[3], reports[0]); // all ranks report the same
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # When not to use it
//!
//! - To serve models: [`infer`] is for looking at what was trained.
//! - On several machines without GPUs: ranks are threads of one process on `moe_kernels::Cpu`; on `moe_kernels::Cuda` (feature
//!   `cuda`) they are processes, which [`run::launch`], torchrun or Slurm starts.
//! - For dense models alone: they train (`checkpoint upcycle` starts from one), but nothing is tuned for them.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod command;
pub mod config;
pub mod data;
pub mod diff;
pub mod durable;
pub mod error;
pub mod eval;
pub mod infer;
pub mod metrics;
pub mod optim;
mod passes;
pub mod run;
pub mod schedule;
pub mod trace;
pub mod trainer;

pub use error::{Error, Result};

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
