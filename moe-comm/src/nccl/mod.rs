//! Ranks as processes with a GPU each, between which NCCL moves data.
//!
//! The only unsafe code of the crate: calls of NCCL, which take addresses of device memory.
#![allow(unsafe_code, reason = "calls of a C library")]

mod calls;
mod comm;
mod communicator;
mod lane;
mod library;
mod transfer;
mod world;

pub use world::NcclWorld;
