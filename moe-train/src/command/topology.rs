//! `moe-train topology`.

use clap::{Args, ValueEnum};
use moe_topology::{Attention, Constraints, Folding, Mapping, Order, draw};

use super::axes::Axes;
use crate::Result;

/// Show how ranks are folded into groups.
#[derive(Debug, Args)]
pub struct Topology {
    /// Number of ranks.
    #[arg(long)]
    world_size: usize,
    #[command(flatten)]
    axes: Axes,
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
        let Topology { world_size, axes, format } = self;
        let Axes { tp, cp, cp_ulysses, pp, ep, etp, order } = axes;
        let order: Order = order.parse()?;
        let mapping = Mapping { world_size, tp, cp, pp, ep, etp, order, ..Mapping::default() };
        Constraints { cp_ulysses, ..Constraints::default() }.fold(mapping.clone())?;
        let folding = Folding::new(mapping.split(Attention::CP_INNER, cp_ulysses))?;
        let drawn = match format {
            Format::Text => draw::text(&folding),
            Format::Json => draw::json(&folding),
            Format::Svg => draw::svg(&folding),
        };
        println!("{}", drawn.trim_end());
        if format == Format::Text && cp > 1 {
            println!("{}", context(&folding));
        }
        Ok(())
    }
}

/// How attention crosses the ranks of a context-parallel group.
fn context(folding: &Folding) -> String {
    let first =
        |axes| folding.group(0, axes).iter().map(|rank| rank.to_string()).collect::<Vec<_>>().join(" ");
    let (inner, outer) = (Attention::CP_INNER, Attention::CP_OUTER);
    let exchange =
        format!("all-to-all of heads (Ulysses) among {} ranks, as [{}]", folding.size(inner), first(inner));
    let ring = format!("a ring of {} ranks, as [{}]", folding.size(outer), first(outer));
    match (folding.size(inner), folding.size(outer)) {
        (1, _) => format!("attention over cp: {ring}"),
        (_, 1) => format!("attention over cp: {exchange}"),
        _ => format!("attention over cp: {exchange}; {ring}"),
    }
}
