//! Ranks as threads of one process.

mod comm;
mod job;
mod reduce;
mod world;

pub use comm::ThreadRank;
pub use world::ThreadWorld;
