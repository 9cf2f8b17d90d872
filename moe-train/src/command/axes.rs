//! The sizes of the axes, as commands take them.

use clap::Args;

use crate::config::{Dispatcher, ParallelConfig};

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

/// How ranks are folded that pass tokens through a model.
#[derive(Debug, Args)]
pub struct Parallel {
    /// Number of ranks; 1 if only other sizes are given.
    #[arg(long)]
    world_size: Option<usize>,
    #[command(flatten)]
    axes: Axes,
    /// Virtual stages per pipeline rank.
    #[arg(long, default_value_t = 1)]
    vpp: usize,
    /// How tokens reach their experts.
    #[arg(long, value_enum, default_value_t = Dispatcher::default())]
    dispatcher: Dispatcher,
}

impl Parallel {
    /// What was given, and the defaults of the rest; none if nothing was.
    pub fn config(self) -> Option<ParallelConfig> {
        let Parallel { world_size, axes, vpp, dispatcher } = self;
        let Axes { tp, cp, cp_ulysses, pp, ep, etp, order } = axes;
        let config = ParallelConfig {
            world_size: world_size.unwrap_or(1),
            tp,
            cp,
            cp_ulysses,
            pp,
            ep,
            etp,
            vpp,
            order,
            dispatcher,
            ..ParallelConfig::default()
        };
        (world_size.is_some() || config != ParallelConfig::default()).then_some(config)
    }
}
