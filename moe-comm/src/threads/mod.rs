//! Ranks as threads of one process.
//!
//! [`ThreadWorld::run`] is for tests, for small machines, and for developing what will run on GPUs: the same code,
//! with failures that are reported in the same way. Ranks share memory, so a message costs one copy, at the receiver.
//! An operation completes as soon as all of its ranks have started it, whoever waits for it or not; a message
//! completes when both sides have started, so code that runs here does not rely on buffering.

#[cfg(loom)]
pub mod board;
#[cfg(not(loom))]
mod board;
mod comm;
mod job;
mod reduce;
mod sync;
mod world;

pub use comm::ThreadRank;
pub use world::{ThreadWorld, WorldError};
