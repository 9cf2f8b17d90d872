//! Kernel families: what a device can compute.
//!
//! Every kernel checks shapes once at its boundary and returns an error; outputs that a kernel overwrites may hold
//! anything before. Sums are formed in `T::Acc` and rounded once. Rows are tokens, sequence-major: the token at
//! position `s` of sequence `b` is row `s · batch + b`, so that sequence shards are row ranges.
//!
//! What only the data can tell to be wrong (an index past the end, a logit that is not a number, offsets that descend) is an error of
//! the call, or, on a device whose calls do not wait, of the next [`download`](crate::Device::download) or
//! [`synchronize`](crate::Device::synchronize); outputs then hold anything.

mod activation;
mod attention;
mod balance;
mod elementwise;
mod embedding;
mod gemm;
mod grouped;
mod grouped_bias;
mod grouped_glu;
mod loss;
mod norm;
pub(crate) mod norm_rope;
mod optim;
mod reduce;
mod rope;
mod routing;
mod rows;

pub use activation::{Activation, GateFunction};
pub use attention::{Attention, AttentionMask, AttentionShape};
pub use balance::{Balance, BalanceInput, BalanceTerm, BalanceTerms};
pub use elementwise::Elementwise;
pub use embedding::Embedding;
pub use gemm::{Gemm, Op};
pub use grouped::GroupedGemm;
pub use grouped_bias::GroupedBias;
pub use grouped_glu::{Gate, GateGradients, GroupedGlu};
#[cfg(feature = "cuda")]
pub(crate) use grouped_glu::{gemm_then_glu, gemm_then_glu_backward};
pub use loss::Loss;
pub use norm::Norm;
pub use optim::{AdamW, AdamWRun, AdamWSlice, MomentMut, Optim};
pub use reduce::Reduce;
pub use rope::{Rope, RotaryHead, RotaryPairs, Rotation};
pub use routing::{
    DropLimit, ExpertGroups, RouteInput, RouteOutput, Routing, ScoreFunction, Scoring, SortOutput,
};
pub use rows::{ColumnBlocks, Rows};
