//! Pipeline-parallel schedules as data: generate, lower, validate, simulate, execute.
//!
//! A pipeline cuts a model into stages on different ranks and sends micro-batches through them. In which order each rank
//! does its forward and backward passes decides how long it idles, how many activations it keeps, and whether the ranks
//! end up waiting for each other for ever. Here that order is a value:
//!
//! 1. [`generate`] makes a [`Schedule`]: GPipe, 1F1B, interleaved, breadth-first, zero-bubble, V-shaped, DualPipe; or read one from text
//!    in torch's form (`0F0,0B0`).
//! 2. [`lower`](lower()) adds sends, receives and waits, from one global order.
//! 3. [`validate`](validate()) proves that it runs: every micro-batch once, all sums in ascending micro-batch order,
//!    each message matched, no deadlock even where sends block, activations within a budget. Only it makes a
//!    [`Program`], and its errors name the rank, the index and the action.
//! 4. [`simulate`](simulate()) says when everything happens at given costs, and why ranks idle.
//! 5. [`execute`](execute()) runs a rank's part over your [`Stage`]s and your [`Transport`].
//!
//! ```
//! use moe_pipeline::{Costs, Link, StageCost, generate, lower, simulate, validate};
//!
//! let schedule = generate::one_f_one_b(3, 4)?;
//! assert_eq!(schedule.to_string().lines().next(), Some("0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3"));
//!
//! let program = validate(lower(&schedule)?, Some(3))?;
//! assert_eq!(program.peak_in_flight(), [3, 2, 1]);
//!
//! let cost = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
//! let timeline = simulate(&program, &Costs::uniform(3, cost, Link::FREE))?;
//! assert_eq!(timeline.idle[0].total(), 2.0 * (1.0 + 2.0)); // (p−1)(f+b)
//! assert_eq!(
//!     timeline.draw(54),
//!     concat!(
//!         "rank 0 0--1--2--............0=====3--1=====...2=====...3=====\n",
//!         "rank 1 ...0--1--......0=====2--1=====3--2=====...3=====......\n",
//!         "rank 2 ......0--0=====1--1=====2--2=====3--3=====............\n",
//!     )
//! );
//! # Ok::<(), moe_pipeline::Error>(())
//! ```
//!
//! [A tour](generate#a-tour) shows the schedules. `examples/threads.rs` trains a small network on plain `Vec<f32>` over channels between threads.
//!
//! # When not to use it
//!
//! - Your stages run in one process on one device: call them one after the other.
//! - You want the order decided at run time by what happens to be ready: here it is fixed before the first action, the
//!   same on every rank, so that a run can be repeated bit for bit.
//!
//! # What is guaranteed
//!
//! - **The schedule never changes the sums.** Per stage, forward, input-gradient and weight-gradient passes each ascend
//!   in the micro-batch, so sums over micro-batches are those of sequential execution, bit for bit.
//! - **No deadlock.** A program runs over a transport whose sends and receives block until they meet, hence over any.
//! - **Nothing waits for ever.** When a rank fails, [`execute`](execute()) aborts its transport, and the others' errors
//!   name the failure; a dead or silent peer is an error within the transport's deadline.
//! - Generating, lowering, validating and simulating are linear in the number of actions. (To make V-Half and V-Min also takes a
//!   time that grows with the cube of the number of ranks.)
#![forbid(unsafe_code)]

mod action;
mod buffers;
mod costs;
mod draw;
mod error;
mod execute;
pub mod generate;
mod lower;
mod memory;
mod placement;
mod schedule;
mod simulate;
mod stage;
mod text;
pub mod transport;
mod validate;
pub mod weave;

pub use action::{Action, Flow, Kind, Message};
pub use buffers::{Buffers, Life, Value};
pub use costs::{Costs, Link, Overlap, StageCost, Woven};
pub use error::{At, Error, Result};
pub use execute::{ExecuteError, execute};
pub use lower::{add_send_recv, add_waits, lower};
pub use memory::{Level, StageMemory};
pub use placement::Placement;
pub use schedule::{Pass, Schedule};
pub use simulate::{Idle, Span, Timeline, Trip, simulate};
pub use stage::Stage;
pub use transport::{Post, Transport};
pub use validate::{Program, validate};

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
