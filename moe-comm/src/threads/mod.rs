//! Ranks as threads of one process.

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
