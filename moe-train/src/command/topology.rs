//! `moe-train topology`.

use clap::{Args, ValueEnum};
use moe_topology::{Folding, Mapping, Order, draw};

use crate::Result;

/// Show how ranks are folded into groups.
#[derive(Debug, Args)]
pub struct Topology {
    /// Number of ranks.
    #[arg(long)]
    world_size: usize,
    /// Tensor parallelism of attention.
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Context parallelism.
    #[arg(long, default_value_t = 1)]
    cp: usize,
    /// Pipeline parallelism, common to both views.
    #[arg(long, default_value_t = 1)]
    pp: usize,
    /// Expert parallelism.
    #[arg(long, default_value_t = 1)]
    ep: usize,
    /// Tensor parallelism inside an expert.
    #[arg(long, default_value_t = 1)]
    etp: usize,
    /// The axes, the one with stride 1 first.
    #[arg(long, default_value = "tp-cp-ep-dp-pp")]
    order: String,
    /// A picture for people, all groups as JSON, or a drawing.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
    Svg,
}

impl Topology {
    pub fn run(self) -> Result<()> {
        let Topology { world_size, tp, cp, pp, ep, etp, order, format } = self;
        let order: Order = order.parse()?;
        let folding = Folding::new(Mapping { world_size, tp, cp, pp, ep, etp, order, ..Mapping::default() })?;
        let drawn = match format {
            Format::Text => draw::text(&folding),
            Format::Json => draw::json(&folding),
            Format::Svg => draw::svg(&folding),
        };
        println!("{}", drawn.trim_end());
        Ok(())
    }
}
