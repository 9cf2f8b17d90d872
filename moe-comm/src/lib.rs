//! Collectives and point-to-point between devices.

#![forbid(unsafe_code)]

pub mod call;
pub mod error;
pub mod raw;

pub use call::{Call, Collective, Reduction};
pub use error::{Error, Result};
pub use raw::{Flight, RawComm, World};
