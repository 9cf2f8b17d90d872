//! Capacity: how many choices an expert takes, and which are dropped.
//!
//! A step of its own between router and dispatcher: some experts of a [`Routing`](crate::Routing) become −1, which
//! dispatchers route nowhere. Weights stay as they are: what survives is not renormalised, a token that lost all its
//! choices gets 0, and the router, which keeps its own choices, still sends gradients through its normaliser. Balance is
//! counted by the router, before anything is dropped.

#[cfg(feature = "native")]
mod native;

use std::fmt;

#[cfg(feature = "native")]
pub use native::{Spread, drop_excess};

/// Which choices an expert keeps (`moe_token_drop_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DropPolicy {
    /// `"probs"`: those of the largest weights.
    #[default]
    Probs,
    /// `"position"`: the first.
    Position,
}

impl DropPolicy {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            DropPolicy::Probs => "probs",
            DropPolicy::Position => "position",
        }
    }
}

impl fmt::Display for DropPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The choices that each expert keeps of a unit of `slots` tokens, padding included: `x = factor · slots · K / E`, rounded
/// up (where rounding did not put it barely above a whole number), at least 1 and at most all tokens.
///
/// ```
/// use moe_dispatch::capacity::expert_capacity;
///
/// assert_eq!(expert_capacity(1.0, 12, 2, 8), 3);
/// assert_eq!(expert_capacity(1.1, 12, 2, 8), 4); // 3.3
/// assert_eq!(expert_capacity(1.1, 10, 1, 1), 10); // no more than there are
/// assert_eq!(expert_capacity(0.001, 12, 2, 8), 1);
/// ```
pub fn expert_capacity(factor: f64, slots: usize, top_k: usize, num_experts: usize) -> usize {
    let x = factor * slots as f64 * top_k as f64 / num_experts as f64;
    ((x - 1e-9 * x).ceil() as usize).max(1).min(slots)
}
