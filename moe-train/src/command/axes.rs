//! The sizes of the axes, as commands take them.

use clap::Args;

/// How ranks are folded.
#[derive(Debug, Args)]
pub struct Axes {
    /// Tensor parallelism of attention.
    #[arg(long, default_value_t = 1)]
    pub tp: usize,
    /// Context parallelism.
    #[arg(long, default_value_t = 1)]
    pub cp: usize,
    /// Ranks of context parallelism that exchange heads by all-to-all (Ulysses); the groups of them form a ring.
    #[arg(long, default_value_t = 1)]
    pub cp_ulysses: usize,
    /// Pipeline parallelism, common to both views.
    #[arg(long, default_value_t = 1)]
    pub pp: usize,
    /// Expert parallelism.
    #[arg(long, default_value_t = 1)]
    pub ep: usize,
    /// Tensor parallelism inside an expert.
    #[arg(long, default_value_t = 1)]
    pub etp: usize,
    /// The axes, the one with stride 1 first.
    #[arg(long, default_value = "tp-cp-ep-dp-pp")]
    pub order: String,
}
