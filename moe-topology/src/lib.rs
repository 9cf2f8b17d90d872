//! Rank arithmetic of MoE parallel folding.
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
pub use layout::Layout;
pub use locality::{Cluster, Span};
pub use mapping::{Mapping, Order, Splits};
pub use placement::{Owner, Placement};
pub use shard::Run;
