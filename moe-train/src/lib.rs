//! Training Mixture-of-Experts Transformers under any folding.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod command;
pub mod config;
pub mod data;
pub mod durable;
pub mod error;
pub mod infer;
pub mod metrics;
pub mod optim;
pub mod run;
pub mod schedule;
pub mod trainer;

pub use error::{Error, Result};
