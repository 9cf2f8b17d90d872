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

use crate::Error;

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
/// # Errors
/// [`Error::Factor`] unless `factor` is above 0 (it may be infinite), [`Error::Experts`] without experts.
///
/// ```
/// use moe_dispatch::capacity::expert_capacity;
///
/// assert_eq!(expert_capacity(1.0, 12, 2, 8)?, 3);
/// assert_eq!(expert_capacity(1.1, 12, 2, 8)?, 4); // 3.3
/// assert_eq!(expert_capacity(1.1, 10, 1, 1)?, 10); // no more than there are
/// assert_eq!(expert_capacity(0.001, 12, 2, 8)?, 1);
/// # Ok::<(), moe_dispatch::Error>(())
/// ```
pub fn expert_capacity(factor: f64, slots: usize, top_k: usize, num_experts: usize) -> Result<usize, Error> {
    if num_experts == 0 {
        return Err(Error::Experts { num_experts, ep: 1 });
    }
    let x = above_zero(factor)? * slots as f64 * top_k as f64 / num_experts as f64;
    Ok(rounded_up(x).max(1).min(slots))
}

/// The rows that an expert-parallel rank may receive of a micro-batch, if each rank has `tokens` tokens: `factor` times what
/// it would receive if all experts were chosen equally often, and each row goes to all `etp` ranks that share an expert
/// (`moe_expert_rank_capacity_factor`).
///
/// # Errors
/// [`Error::Factor`] unless `factor` is above 0; it may be infinite.
///
/// ```
/// use moe_dispatch::capacity::expert_rank_budget;
///
/// // 4 ranks of 10 tokens with 2 choices each: 80 rows for EP4, or for EP2 twice.
/// assert_eq!(expert_rank_budget(1.0, 10, 2, 1)?, 20);
/// assert_eq!(expert_rank_budget(1.25, 10, 2, 2)?, 50);
/// # Ok::<(), moe_dispatch::Error>(())
/// ```
pub fn expert_rank_budget(factor: f64, tokens: usize, top_k: usize, etp: usize) -> Result<usize, Error> {
    Ok(rounded_up(above_zero(factor)? * (etp as f64 * tokens as f64 * top_k as f64)))
}

fn above_zero(factor: f64) -> Result<f64, Error> {
    if factor > 0.0 { Ok(factor) } else { Err(Error::Factor { factor }) }
}

/// `⌈x − 1e-9·x⌉`, of which `∞` would make no number.
fn rounded_up(x: f64) -> usize {
    let x = if x.is_finite() { x - 1e-9 * x } else { x };
    x.ceil() as usize
}
