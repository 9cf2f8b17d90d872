//! Collectives and point-to-point between devices.

#![forbid(unsafe_code)]

pub mod call;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod count;
pub mod error;
pub mod fault;
pub mod pending;
pub mod raw;
pub mod registry;
pub mod threads;
pub mod typed;

pub use call::{Call, Collective, Reduction, Signature};
pub use error::{Error, Result};
pub use pending::Pending;
pub use raw::{Flight, RawComm, World};
pub use registry::{Comms, CommsBuilder};
pub use threads::{ThreadRank, ThreadWorld, WorldError};
pub use typed::{Comm, Message};
