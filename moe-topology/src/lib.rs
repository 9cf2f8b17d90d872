//! Rank arithmetic of five-dimensional parallelism with *MoE parallel folding*
//! ([arXiv 2504.14960](https://arxiv.org/abs/2504.14960)): which rank does what, who forms a group with whom, and where
//! each tensor lives.
//!
//! A Mixture-of-Experts Transformer is parallelised twice over the same ranks: attention over tensor, context and data
//! parallelism (`tp`, `cp`, `dp`), its experts over expert tensor, expert and expert data parallelism (`etp`, `ep`,
//! `edp`), both over the same pipeline (`pp`). Each is a mixed-radix numbering of the ranks; the pair is a [`Folding`].
//! The named groups equal those of Megatron-Core, in members and order, in 23 recorded configurations.
//!
//! ```
//! use moe_topology::{Attention, Cluster, Expert, Folding, Mapping, Owner, Placement};
//!
//! // 16 ranks: attention TP2×CP2×DP2×PP2, experts ETP1×EP4×EDP2×PP2.
//! let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
//! let folding = Folding::new(mapping)?;
//!
//! // The group of a rank: arithmetic, `Copy`, nothing allocated.
//! let ep = folding.group(5, Expert::EP);
//! assert!(ep.iter().eq([4, 5, 6, 7]));
//! assert_eq!(ep.position(5), Some(1));
//! assert!(Cluster::default().inside_node(ep.ranks()));
//!
//! // Where a matrix lives, and what follows from it.
//! let q = Placement::new(&[64, 32], &[(0, Attention::TP)], Attention::CP | Attention::DP, Owner::Stage(0))?;
//! assert_eq!(q.slice(&folding, 5)[..], [32..64, 0..32]);
//! assert!(q.partial_group(&folding, 5).iter().eq([1, 3, 5, 7]));
//!
//! // What cannot be folded says why, and what comes nearest.
//! let error = Folding::new(Mapping { world_size: 16, tp: 3, ..Mapping::default() }).unwrap_err();
//! assert!(error.to_string().starts_with(
//!     "illegal mapping: world_size must be a multiple of tp·cp·pp, but 16 % (3·1·1 = 3) = 1"
//! ));
//! # Ok::<(), moe_topology::Error>(())
//! ```
//!
//! # Where to start
//!
//! | to | see |
//! |---|---|
//! | write down a mapping | [`Mapping`], [`Order`]; [`Mapping::split`] for an axis of two digits |
//! | fold it | [`Folding::new`], or [`Constraints::fold`] with a model's and a batch's rules |
//! | find groups and coordinates | [`Folding::group`], [`Folding::groups`], [`Folding::coordinates`] |
//! | derive shards, reductions, optimizer cuts | [`Placement`] |
//! | choose a mapping | [`enumerate()`], [`nearest`], [`Cluster`] |
//! | look at one | [`draw`]; [`megatron`] for the reference's names |
//!
//! # When not to use it
//!
//! It knows no devices, threads or messages: it says *who* talks, never *how*. If attention and experts share one
//! mapping and a plain grid of ranks is enough, a grid is simpler. Worlds stop at 2³²−1 ranks.
#![forbid(unsafe_code)]

mod axis;
mod constraints;
pub mod draw;
mod enumerate;
mod error;
mod explain;
mod folding;
mod group;
mod layout;
mod locality;
mod mapping;
pub mod megatron;
mod placement;
mod shard;

pub use axis::{Attention, Axes, Expert, GroupKey, View, ViewKind};
pub use constraints::Constraints;
pub use enumerate::enumerate;
pub use error::{Error, Product, Rule};
pub use explain::{Nearest, nearest};
pub use folding::Folding;
pub use group::{Group, Ranks, RanksIter};
pub use locality::{Cluster, Span};
pub use mapping::{Mapping, Order, Splits};
pub use placement::{Owner, Placement};
pub use shard::Run;

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
