//! The second level: the layers of an overlap, woven so that all-to-alls hide behind compute.
//!
//! An [overlap](crate::Kind::Overlap) is a forward pass of one micro-batch and a backward pass of another on one rank. In a
//! layer of experts each of them twice waits for an all-to-all: tokens go to their experts (*dispatch*) and back (*combine*). While one
//! pass waits, the other can compute, because they do not need each other. Here that is a list of [`Step`]s, decided before anything
//! runs:
//!
//! 1. [`weave()`] makes an [`Order`] from what layers cost.
//! 2. [`Order::new`], also behind [`str::parse`], checks one from elsewhere.
//! 3. [`Order::simulate`] says what it takes on a compute lane beside a lane of all-to-alls; `Woven`
//!    brings that to the pipeline's simulator.
//! 4. [`run`] drives two [`Task`]s through it: passes that can stop after each step and own the all-to-all they have started.
//!
//! All ranks of an expert group have the same layers. Given the same costs, they have the same order, and so start their all-to-alls
//! (and whatever collectives the compute steps do) in the same order; what happens to be ready is never asked.
//!
//! ```
//! use moe_pipeline::StageCost;
//! use moe_pipeline::weave::{LayerCost, weave};
//!
//! let compute = StageCost { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
//! let layer = LayerCost::Moe { attention: compute, experts: compute, all_to_all: 1.0 };
//! let order = weave(&[layer], &[layer])?;
//! assert_eq!(
//!     order.to_string(),
//!     "0I_COMBINE,0F_ATTENTION,0F_DISPATCH,0I_WAIT_COMBINE,0I_EXPERTS,0I_DISPATCH,0F_WAIT_DISPATCH,0F_EXPERTS,\
//!      0F_COMBINE,0W_EXPERTS,0I_WAIT_DISPATCH,0I_ATTENTION,0W_ATTENTION,0F_WAIT_COMBINE"
//! );
//! let woven = order.simulate(&[layer], &[layer])?;
//! assert_eq!((woven.makespan, woven.exposed()), (6.0, 0.0)); // of 10 one after the other
//! # Ok::<(), moe_pipeline::Error>(())
//! ```
//!
//! # Nodes
//!
//! | | forward `F` | input gradient `I`, layers descending | weight gradient `W`, any time after its `I` |
//! |---|---|---|---|
//! | dense layer | `DENSE` | `DENSE` | `DENSE` |
//! | layer of experts | `ATTENTION`, `DISPATCH`, `EXPERTS`, `COMBINE` | `COMBINE`, `EXPERTS`, `DISPATCH`, `ATTENTION` | `EXPERTS`, `ATTENTION` |
//!
//! `ATTENTION` is all before dispatch, the router included. A stage's embedding or head is part of its first or last layer.
//!
//! # Costs that are not known
//!
//! A lane's work is a bound: c for computes, k·x for k all-to-alls of length x. An order that takes c + δ where the two are equal,
//! x = c/k, takes at most max(c, k·x) + δ for every other x, since no path through it has more than k all-to-alls, or gets longer when
//! they get shorter. Of equal layers whose computes take 1 each that is x = 1.5: who knows no costs takes it.

mod cost;
mod execute;
mod generate;
mod node;
mod order;
mod search;
mod simulate;
mod text;

pub use cost::LayerCost;
pub use execute::{Task, run};
pub use generate::weave;
pub use node::{Layer, Node, Part, Phase, Step};
pub use order::Order;
pub use simulate::{NodeSpan, WovenTimeline};
