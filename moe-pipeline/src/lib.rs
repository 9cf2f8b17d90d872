//! moe-pipeline
#![forbid(unsafe_code)]

mod action;
mod draw;
mod error;
mod execute;
pub mod generate;
mod lower;
mod schedule;
mod simulate;
mod stage;
mod text;
pub mod transport;
mod validate;

pub use action::{Action, Flow, Kind, Message};
pub use error::{At, Error, Result};
pub use execute::{ExecuteError, execute};
pub use lower::{add_send_recv, add_waits, lower};
pub use schedule::{Pass, Placement, Schedule};
pub use simulate::{Costs, Idle, Link, Span, StageCost, Timeline, simulate};
pub use stage::Stage;
pub use transport::{Post, Transport};
pub use validate::{Program, validate};
