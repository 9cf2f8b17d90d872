//! A rank's place among those that share a set of experts.

use std::ops::Range;

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

    /// The experts of this rank, out of `num_experts`.
    ///
    /// # Errors
    /// [`Error::Experts`] unless `num_experts` is a positive multiple of the EP size.
    pub fn local_experts(&self, num_experts: usize) -> Result<Range<usize>, Error> {
        let (rank, size) = self.ep;
        if num_experts == 0 || num_experts % size != 0 {
            return Err(Error::Experts { num_experts, ep: size });
        }
        let per_rank = num_experts / size;
        Ok(rank * per_rank..(rank + 1) * per_rank)
    }
}
