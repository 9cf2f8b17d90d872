//! The control plane of a world whose ranks are processes, on one machine or on several.
//!
//! Devices of several processes move data by themselves, and know nothing of each other's intentions: a rank that calls
//! another operation than its peers, or none, leaves them waiting for ever. Here the ranks say what they start to a
//! [`Hub`], which one process of the world makes; it compares their calls as a [`ThreadWorld`](crate::ThreadWorld) does,
//! names who is late, and tells everyone of the first failure. No rank waits for it to start an operation.
//!
//! A rank is a [`Process`]: its line to the hub. Programs use it to start and end together, to share a few bytes
//! ([`Process::share`]) and to give up ([`Process::fail`]); backends, which implement [`World`](crate::World) upon it,
//! also make groups ([`Process::meet`]) and report operations ([`Process::arrive`], [`Process::arrive_and_wait`]), and
//! end what their device does when the world has failed ([`Process::on_failure`]).
//!
//! ```
//! use std::time::Duration;
//!
//! use moe_comm::processes::{Hub, Process};
//!
//! let deadline = Duration::from_secs(10);
//! let hub = Hub::listen("127.0.0.1:0", 2, deadline)?;
//! let address = hub.address().to_string();
//! // In a process each; here on threads.
//! let ranks = [0, 1].map(|rank| {
//!     let address = address.clone();
//!     std::thread::spawn(move || {
//!         let process = Process::join(&address, rank, 2, deadline)?;
//!         let seed = process.share((rank == 0).then_some(b"seed 7"))?;
//!         process.barrier()?;
//!         Ok::<_, moe_comm::Error>(seed)
//!     })
//! });
//! for rank in ranks {
//!     assert_eq!(rank.join().unwrap()?, b"seed 7");
//! }
//! # Ok::<(), moe_comm::Error>(())
//! ```
//!
//! # When not to use it
//!
//! To move data: bytes that are shared go through one process and are at most a mebibyte. On a network that others can
//! write to: whoever reaches the hub can join the world or end it. For processes that come back: a rank that has left
//! does not join again, and the world ends with the first that fails.

mod bytes;
mod connect;
mod frame;
mod hub;
mod line;
mod meeting;
mod wire;

use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use crate::board::Lane;
pub use hub::Hub;
pub use line::{Arrival, GroupId, Process};

use crate::{Error, Result};

/// Who has nothing to say for so long says that it is alive.
const BEAT: Duration = Duration::from_millis(500);
/// How long an end is waited for that should come at once.
const GRACE: Duration = Duration::from_secs(1);

/// After so long without a sign of life a connection is given up: its machine is gone, or its process has stopped.
fn silence(deadline: Duration) -> Duration {
    // Beats come late from a busy machine.
    deadline.saturating_add(BEAT * 10)
}

fn rendezvous(what: String) -> Error {
    Error::Rendezvous { what }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let started = thread::Builder::new().name(name).spawn(body);
    started.map_err(|error| rendezvous(format!("a thread could not be started: {error}")))
}
