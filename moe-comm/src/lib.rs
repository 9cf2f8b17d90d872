//! Collectives and point-to-point between devices, for the groups of a folding.
//!
//! A rank makes its communicators once ([`Comms`]) and calls operations on tensors ([`Comm`]): all-reduce, all-gather,
//! reduce-scatter, all-to-all (with uneven rows), broadcast, barrier, messages; blocking, or started and then awaited.
//! Nothing waits forever, and nothing goes wrong silently:
//!
//! - Calls are numbered and compared. Ranks that call different operations, shapes, types, counts, roots or tags get an
//!   error that describes both calls.
//! - Ranks wait for each other until a deadline. Then the ranks that did not arrive are named, or the circle of ranks
//!   that wait for each other.
//! - The first failure of a world (a panic, an error, a deadline, a mismatch, an abort) is recorded once, with rank,
//!   group, operation and number ([`Error::Poisoned`]), and ends every operation of every group.
//! - The same run gives the same bits: reductions have a fixed order.
//!
//! [`ThreadWorld`] runs ranks as threads of one process; a rank alone on any device has a [`SoloWorld`]; ranks as processes
//! have their control plane in [`processes`]. Other backends implement [`World`], [`RawComm`] and
//! [`Flight`], which are made for streams and device buffers, and are held to the suite in `conformance` (a feature).
//! [`count`], [`trace`] and [`fault`] are decorators of any backend.
//!
//! ```
//! use std::time::Duration;
//!
//! use moe_comm::{Comms, Reduction, ThreadWorld, World};
//! use moe_kernels::{Cpu, Tensor};
//! use moe_topology::{Attention, Expert, Folding, Mapping};
//!
//! let sums = ThreadWorld::run(4, Duration::from_secs(10), |world| -> moe_comm::Result<_> {
//!     let device = Cpu::new(1);
//!     // Attention: TP2 × DP2. Experts: EP4.
//!     let mapping = Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() };
//!     let folding = Folding::new(mapping).expect("a legal mapping");
//!     let comms =
//!         Comms::builder().attention(Attention::TP).expert(Expert::EP).build(&world, &device, &folding)?;
//!
//!     let x = Tensor::<f32, Cpu>::from_slice(&device, 1, 2, &[world.rank() as f32, 1.0])?;
//!     let sum = comms.group(Attention::TP)?.start_all_reduce(&x, Reduction::Sum)?;
//!     let everyone = comms.group(Expert::EP)?.all_gather_rows(&x)?;
//!     assert_eq!(everyone.shape(), [4, 2]);
//!     Ok(sum.wait()?.to_vec(&device)?)
//! })?;
//! assert_eq!(sums, [[1.0, 2.0], [1.0, 2.0], [5.0, 2.0], [5.0, 2.0]]);
//! # Ok::<(), moe_comm::WorldError>(())
//! ```
//!
//! # When not to use it
//!
//! For processes that come and go, for untrusted networks, or to wait on several operations for whichever is first: the
//! order of operations is part of the program, the same on all ranks of a group.

#![deny(unsafe_code)]

#[cfg(not(loom))]
mod board;
#[cfg(loom)]
pub mod board;
mod call;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod count;
mod decorate;
mod error;
pub mod fault;
#[cfg(all(feature = "nccl", not(loom)))]
mod nccl;
mod pending;
#[cfg(not(loom))]
pub mod processes;
mod raw;
mod registry;
mod solo;
mod threads;
pub mod trace;
mod typed;
mod world_error;

pub use moe_kernels;
pub use moe_topology;

pub use call::{Call, Collective, Reduction, Signature};
pub use error::{Error, Result};
#[cfg(all(feature = "nccl", not(loom)))]
pub use nccl::NcclWorld;
pub use pending::Pending;
pub use raw::{Flight, RawComm, World};
pub use registry::{Comms, CommsBuilder};
pub use solo::SoloWorld;
pub use threads::{ThreadRank, ThreadWorld};
pub use typed::{Comm, Message, PendingPair};
pub use world_error::WorldError;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
