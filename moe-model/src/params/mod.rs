//! Parameters of one rank: one flat store per reduction group, made from placements.
//!
//! A *logical* tensor is a mathematical one (q, one expert's gate) with a [`Placement`](moe_topology::Placement); a
//! *storage* tensor stacks the blocks that this rank holds of one or several logical tensors, so that one GEMM serves
//! them; a *bucket* holds the storage tensors of one layer whose gradients are partial over the same axes, so that one
//! collective reduces them, as soon as that layer's gradients are complete. Everything about a parameter (its block, its
//! start, its reduction, whether it decays, whether this rank counts it in a norm) is derived from the placement and kept
//! in the [`Part`].
//!
//! A *buffer* is state without a gradient, such as the bias of a router: no optimizer, norm or decay sees it, checkpoints
//! hold it.

mod init;
mod layout;
mod store;

pub use init::{Init, Stream};
pub use layout::{
    BucketLayout, BufferId, BufferLayout, Logical, Name, OtherCopy, ParamId, ParamLayout, ParamLayoutBuilder,
    Part, Placed, Segment,
};
pub use store::{ParamStore, WeightAndGrad};
