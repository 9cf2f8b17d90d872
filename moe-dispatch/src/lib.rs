//! MoE router and token dispatcher.

#![forbid(unsafe_code)]

pub mod all_gather;
pub mod all_to_all;
pub mod dispatcher;
pub mod error;
pub mod fabric;
pub mod grid;
pub mod plan;
pub mod routing;
pub mod token_dispatcher;

pub use all_gather::{AllGather, AllGatherState};
pub use all_to_all::{AllToAll, AllToAllState};
pub use dispatcher::{BatchOf, DispatchState, Dispatcher, Flight, FlightOf};
pub use error::Error;
pub use fabric::{Arrived, Fabric, Over, Transfer};
pub use grid::{Grid, InnerAxis};
pub use routing::{Batch, Routing, Sorted};
pub use token_dispatcher::{DispatcherKind, TokenDispatcher, TokenDispatcherState};

#[cfg(feature = "conformance")]
pub mod conformance;

#[cfg(feature = "native")]
pub mod native;
#[cfg(feature = "native")]
pub mod router;
#[cfg(feature = "native")]
pub use native::{NativeFabric, NativePending};
#[cfg(feature = "native")]
pub use router::{Router, RouterConfig, RouterSaved, RouterScales, RouterStats, RoutingOn};
