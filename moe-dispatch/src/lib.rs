//! MoE router and token dispatcher over expert parallelism (EP) and expert tensor parallelism (ETP), forward and
//! backward.
//!
//! A router chooses `K` of `E` experts for each token. The experts live on other ranks: expert `e` on EP rank
//! `e / (E/EP)`, sliced along its feed-forward dimension over ETP. A [`Dispatcher`] brings each token's row and the
//! probability of each choice to the ranks that hold the expert, grouped by expert, and brings the results back,
//! summed over choices and slices; and the same for gradients. Every movement is two calls, so that a schedule can
//! work between them ([`AllToAll`] says what then moves), and all that is kept from forward to backward is in a state that the caller owns: any number of
//! micro-batches are in flight.
//!
//! - [`AllToAll`], [`AllGather`]: the two dispatchers; [`TokenDispatcher`] picks by name.
//! - [`Fabric`]: what a tensor library lends; the module `conformance` (feature of that name) holds it to its word.
//! - [`capacity`]: how many choices an expert takes, and which are dropped.
//! - [`plan`]: the arithmetic on counts in between, pure.
//! - `Router`, `capacity::drop_excess`, `NativeFabric`: on this workspace's tensors (feature `native`, on by default).
//!   Without it the crate depends on `moe-topology` only.
//!
//! # Example
//!
//! Two tokens, four experts, one rank; experts that return their input. On several ranks only the fabric differs.
//!
//! ```
//! # #[cfg(feature = "native")]
//! # fn main() -> Result<(), moe_dispatch::Error> {
//! use moe_dispatch::{AllToAll, Dispatcher, NativeFabric, Routing, Shapes};
//! use moe_kernels::{Cpu, Tensor};
//!
//! let device = Cpu::new(1);
//! let fabric = NativeFabric::<f64, Cpu>::single(&device);
//! let dispatcher = AllToAll { num_experts: 4 };
//!
//! let x = Tensor::from_slice(&device, 2, 1, &[10.0, 20.0])?;
//! let routing = Routing {
//!     experts: Tensor::from_slice(&device, 2, 2, &[3, 0, 0, 2])?,
//!     weights: Tensor::from_slice(&device, 2, 2, &[0.75, 0.25, 0.5, 0.5])?,
//!     tokens: 2,
//!     top_k: 2,
//!     shapes: Shapes::Exact,
//! };
//! let (batch, state) = dispatcher.dispatch(&fabric, &x, &routing)?;
//! assert_eq!(batch.x.to_vec(&device)?, [10.0, 20.0, 20.0, 10.0]); // of experts 0, 0, 2, 3
//! assert_eq!(batch.probs.to_vec(&device)?, [0.25, 0.5, 0.5, 0.75]);
//! assert_eq!(batch.offsets.to_vec(&device)?, [0, 2, 2, 3, 4]);
//!
//! let y = dispatcher.combine(&fabric, batch.x, &state)?;
//! assert_eq!(y.to_vec(&device)?, [20.0, 40.0]);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "native"))]
//! # fn main() {}
//! ```
//!
//! # When not to use it
//!
//! For inference with paged or quantised experts, for experts that are not spread evenly over EP, or on a single device
//! where one fused kernel does it all.

#![forbid(unsafe_code)]

pub mod all_gather;
pub mod all_to_all;
pub mod capacity;
pub mod dispatcher;
pub mod error;
pub mod fabric;
pub mod grid;
pub mod plan;
pub mod routing;
mod sources;
pub mod token_dispatcher;

pub use all_gather::{AllGather, AllGatherState};
pub use all_to_all::{AllToAll, AllToAllState};
pub use dispatcher::{BatchOf, DispatchState, Dispatcher, Flight, FlightOf};
pub use error::Error;
pub use fabric::{Arrived, Fabric, Over, Transfer};
pub use grid::{Grid, InnerAxis};
pub use moe_topology;
pub use routing::{Batch, Routing, Shapes, Sorted, SortedRows};
pub use token_dispatcher::{DispatcherKind, TokenDispatcher, TokenDispatcherState};

#[cfg(feature = "conformance")]
pub mod conformance;

#[cfg(feature = "native")]
pub mod native;
#[cfg(feature = "native")]
pub mod router;
#[cfg(feature = "native")]
pub use moe_kernels::family::{DropLimit, ExpertGroups, ScoreFunction, Scoring};
#[cfg(feature = "native")]
pub use native::{NativeFabric, NativePending};
#[cfg(feature = "native")]
pub use router::{
    Jitter, Margins, ModelUnit, Routed, Router, RouterConfig, RouterInput, RouterSaved, RouterScales,
    RouterStats, RouterSum, RouterSums, RoutingOn, Sinkhorn, SumOverUnit,
};
#[cfg(feature = "native")]
pub use {moe_comm, moe_kernels};

#[cfg(all(doctest, feature = "native"))]
#[doc = include_str!("../README.md")]
struct Readme;
