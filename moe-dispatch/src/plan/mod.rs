//! Host arithmetic on row counts: pure, and tested alone.
//!
//! [`Counts`] says how many rows every rank has for every expert; [`Splits`] what follows for the transfers of one
//! rank; [`ChunkOrder`] how received rows are sorted by expert and back.

mod chunks;
mod counts;

pub use chunks::ChunkOrder;
pub use counts::{Counts, Splits};
