//! A rank's place among those that share a set of experts.

use std::ops::Range;

use moe_topology::{Expert, Folding};

use crate::Error;

/// This rank's coordinates in its expert-parallel × expert-tensor-parallel group.
///
/// Expert `e` of `E` lives on the ranks of EP coordinate `e / (E / ep)`; each of those `etp` ranks holds a slice of
/// its feed-forward dimension, so that what they compute are partial sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    ep: (usize, usize),
    etp: (usize, usize),
    inner: InnerAxis,
}

/// The axis whose neighbours stand next to each other in the EP×ETP group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InnerAxis {
    /// Position `ep_rank · etp + etp_rank`: Megatron's default order.
    #[default]
    Etp,
    /// Position `etp_rank · ep + ep_rank`.
    Ep,
}

impl Grid {
    /// A rank at `(rank, size)` of each axis.
    ///
    /// # Errors
    /// [`Error::Coordinate`] unless both ranks are smaller than their sizes.
    pub fn new(ep: (usize, usize), etp: (usize, usize), inner: InnerAxis) -> Result<Self, Error> {
        for (axis, (rank, size)) in [("ep", ep), ("etp", etp)] {
            if rank >= size {
                return Err(Error::Coordinate { axis, rank, size });
            }
        }
        Ok(Grid { ep, etp, inner })
    }

    /// The place of a rank of a folded world in its EP×ETP group.
    ///
    /// ```
    /// use moe_dispatch::Grid;
    /// use moe_topology::{Folding, Mapping};
    ///
    /// let folding = Folding::new(Mapping { world_size: 8, ep: 4, etp: 2, ..Mapping::default() })?;
    /// let grid = Grid::of(&folding, 5)?;
    /// assert_eq!((grid.ep_rank(), grid.etp_rank()), (2, 1));
    /// assert_eq!(grid.local_experts(8)?, 4..6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Coordinate`] if there is no such rank.
    pub fn of(folding: &Folding, rank: usize) -> Result<Self, Error> {
        let size = folding.world_size();
        if rank >= size {
            return Err(Error::Coordinate { axis: "world", rank, size });
        }
        let along = |axes| (folding.coordinate(rank, axes), folding.size(axes));
        let (ep, etp) = (along(Expert::EP), along(Expert::ETP));
        let group = folding.group(rank, Expert::EP | Expert::ETP);
        let ep_is_inner = ep.1 > 1 && etp.1 > 1 && folding.coordinate(group.get(1), Expert::EP) == 1;
        Grid::new(ep, etp, if ep_is_inner { InnerAxis::Ep } else { InnerAxis::Etp })
    }

    /// One rank that holds all experts whole.
    pub const fn single() -> Self {
        Grid { ep: (0, 1), etp: (0, 1), inner: InnerAxis::Etp }
    }

    /// Expert-parallel size.
    pub const fn ep_size(&self) -> usize {
        self.ep.1
    }

    /// Expert-parallel rank.
    pub const fn ep_rank(&self) -> usize {
        self.ep.0
    }

    /// Expert-tensor-parallel size.
    pub const fn etp_size(&self) -> usize {
        self.etp.1
    }

    /// Expert-tensor-parallel rank.
    pub const fn etp_rank(&self) -> usize {
        self.etp.0
    }

    /// Ranks in the EP×ETP group.
    pub const fn size(&self) -> usize {
        self.ep.1 * self.etp.1
    }

    /// Position in the EP×ETP group of the rank with these coordinates.
    pub const fn position(&self, ep_rank: usize, etp_rank: usize) -> usize {
        match self.inner {
            InnerAxis::Etp => ep_rank * self.etp.1 + etp_rank,
            InnerAxis::Ep => etp_rank * self.ep.1 + ep_rank,
        }
    }

    /// This rank's position in the EP×ETP group.
    pub const fn rank(&self) -> usize {
        self.position(self.ep.0, self.etp.0)
    }

    /// The experts of this rank, out of `num_experts`.
    ///
    /// # Errors
    /// [`Error::Experts`] unless `num_experts` is a positive multiple of the EP size.
    pub fn local_experts(&self, num_experts: usize) -> Result<Range<usize>, Error> {
        let (rank, size) = self.ep;
        if num_experts == 0 || !num_experts.is_multiple_of(size) {
            return Err(Error::Experts { num_experts, ep: size });
        }
        let per_rank = num_experts / size;
        Ok(rank * per_rank..(rank + 1) * per_rank)
    }
}
