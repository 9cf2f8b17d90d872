//! The distributed optimizer: ZeRO-1 over exactly the groups in which gradients are partial.
//!
//! Per bucket of the parameter store: gradients are reduce-scattered over the bucket's group, each rank updates its slice
//! of weights and moments, and the updated weights are gathered over the same group. Buckets do not reach beyond a
//! layer, so that a reduction can begin while earlier layers are at their backward pass. Which group that is comes
//! from the placements; this module knows no layer and no list of expert parameters.
//!
//! A rank alone gives all buckets to its device in one call, of which a GPU makes one launch; the norm of the gradient is two, whatever
//! the number of tensors.
//!
//! Master weights are nowhere whole: they are the weights, which a rank alone updates where they are, and of weights in bf16 the low
//! 16 bits of the master weights beside them. Moments are memory of zeros, which the host has to provide as they are first written, and a gradient is freed when
//! its bucket was updated.

mod adamw;
mod groups;
mod master;
mod norm;
mod shard;
mod state;
mod tensors;

pub use adamw::{Hyper, Optimizer};
pub use groups::{GroupError, ParamGroup, ParamGroups, TensorHyper, TensorName};
pub use norm::{GradNorm, ParamNames, PendingGradNorm};
pub use shard::{reduce_gradients, sliced_parts};
pub use state::{Kept, Moment, MomentDType, MomentDTypes};
pub use tensors::model_tensors;
