//! Where the ranks of a group sit: in one node, in one NVLink domain, or across.

use crate::{Axes, Error, Folding, Ranks, View};

/// How ranks are laid over machines: rank `r` sits in node `r / ranks_per_node`.
///
/// ```
/// use moe_topology::{Attention, Cluster, Expert, Folding, Mapping};
///
/// let folding = Folding::new(Mapping { world_size: 128, tp: 2, pp: 8, ep: 8, ..Mapping::default() })?;
/// let dgx = Cluster::default();
/// assert!(dgx.inside_node(folding.group(17, Expert::EP).ranks()));
/// assert_eq!(dgx.nodes(folding.group(17, Attention::DP).ranks()), 2);
/// assert_eq!(dgx.widest(&folding, Expert::EP).nodes, 1);
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    ranks_per_node: usize,
    nvlink_domain: usize,
}

impl Default for Cluster {
    /// Eight ranks per node, connected by NVLink (DGX H100).
    fn default() -> Self {
        Self { ranks_per_node: 8, nvlink_domain: 8 }
    }
}

/// Over how much of a cluster a group reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Number of nodes.
    pub nodes: usize,
    /// Number of NVLink domains.
    pub nvlink_domains: usize,
}

impl Cluster {
    /// `nvlink_domain` is the number of consecutive ranks that NVLink connects: often a node's, on an NVL72 rack 72.
    ///
    /// # Errors
    /// If one of them is 0.
    pub fn new(ranks_per_node: usize, nvlink_domain: usize) -> Result<Self, Error> {
        if ranks_per_node == 0 || nvlink_domain == 0 {
            return Err(Error::EmptyNode { ranks_per_node, nvlink_domain });
        }
        Ok(Self { ranks_per_node, nvlink_domain })
    }

    /// The node of `rank`.
    #[must_use]
    pub fn node(&self, rank: usize) -> usize {
        rank / self.ranks_per_node
    }

    /// Whether all ranks sit in one node.
    #[must_use]
    pub fn inside_node(&self, ranks: Ranks) -> bool {
        self.node(ranks.first()) == self.node(ranks.last())
    }

    /// Whether all ranks sit in one NVLink domain.
    #[must_use]
    pub fn inside_nvlink_domain(&self, ranks: Ranks) -> bool {
        ranks.first() / self.nvlink_domain == ranks.last() / self.nvlink_domain
    }

    /// The number of nodes that the ranks span.
    #[must_use]
    pub fn nodes(&self, ranks: Ranks) -> usize {
        blocks(ranks, self.ranks_per_node)
    }

    /// The number of nodes and NVLink domains that the ranks span.
    #[must_use]
    pub fn span(&self, ranks: Ranks) -> Span {
        Span { nodes: self.nodes(ranks), nvlink_domains: blocks(ranks, self.nvlink_domain) }
    }

    /// The most nodes, and the most NVLink domains, that any group over `axes` spans.
    #[must_use]
    pub fn widest<V: View>(&self, folding: &Folding, axes: Axes<V>) -> Span {
        folding.groups(axes).map(|group| self.span(group.ranks())).fold(
            Span { nodes: 1, nvlink_domains: 1 },
            |widest, span| Span {
                nodes: widest.nodes.max(span.nodes),
                nvlink_domains: widest.nvlink_domains.max(span.nvlink_domains),
            },
        )
    }
}

/// How many blocks of `size` consecutive ranks hold one of the (ascending) ranks.
fn blocks(ranks: Ranks, size: usize) -> usize {
    let mut last = None;
    ranks.iter().filter(|rank| last.replace(rank / size) != Some(rank / size)).count()
}
