//! Where a logical tensor lives: the one list from which everything else is derived.

use smallvec::SmallVec;

use crate::axis::{DP, PP};
use crate::group::{Digit, Ranks};
use crate::{Attention, Axes, Error, Folding, Group, GroupKey, View};

/// Which pipeline stage owns a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// One stage.
    Stage(usize),
    /// Two stages hold a copy each and add their gradients: tied embedding and head. They may be the same stage.
    Tied(usize, usize),
}

/// Where a logical tensor lives and how its gradient comes about.
///
/// The tensor is the mathematical one: `q` and not a fused `qkv`, whole and not one rank's shard. Axes over which it
/// is neither sharded nor partial (`pp` aside) hold identical copies with identical gradients. Everything else follows:
/// what a rank stores ([`local_dims`](Self::local_dims), [`slice`](Self::slice), [`runs`](Self::runs)), over whom its
/// gradient is summed ([`partial_group`](Self::partial_group)), how a sharded optimizer cuts it
/// ([`zero_cut`](Self::zero_cut)) and which rank counts it in a norm or writes it ([`counts`](Self::counts)). Methods that
/// take a rank panic, as those of [`Folding`], if there is no such rank.
///
/// ```
/// use moe_topology::{Attention, Expert, Folding, Mapping, Owner, Placement};
///
/// let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
/// let folding = Folding::new(mapping)?;
///
/// // A column-parallel matrix of stage 0: every CP and DP rank adds its tokens' part of the gradient.
/// let dense = Attention::CP | Attention::DP;
/// let q = Placement::new(&[64, 32], &[(0, Attention::TP)], dense, Owner::Stage(0))?;
/// assert_eq!(q.local_dims(&folding, 3)[..], [32, 32]);
/// assert_eq!(q.slice(&folding, 3)[..], [32..64, 0..32]);
///
/// // The router's weight is on every TP rank, each of which sees other tokens (sequence parallelism).
/// let router = Placement::new(&[8, 32], &[], dense | Attention::TP, Owner::Stage(0))?;
/// assert_eq!(router.partial_group(&folding, 3).len(), 8);
///
/// // All experts' down projections, [experts, hidden, intermediate].
/// let shards = [(0, Expert::EP), (2, Expert::ETP)];
/// let down = Placement::new(&[8, 32, 128], &shards, Expert::EDP, Owner::Stage(1))?;
/// assert_eq!(down.slice(&folding, 11)[..], [6..8, 0..32, 0..128]);
/// assert!(down.partial_group(&folding, 11).iter().eq([11, 15]));
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement<V: View> {
    dims: SmallVec<[usize; 4]>,
    shards: SmallVec<[(usize, Axes<V>); 2]>,
    partial: Axes<V>,
    owner: Owner,
}

impl<V: View> Placement<V> {
    const PP: Axes<V> = Axes::axis(PP);

    /// A tensor of shape `dims`, with dimension `d` in blocks over the axes of each shard `(d, axes)`, whose gradient
    /// is a sum over `partial`.
    ///
    /// # Errors
    /// If a dimension does not exist or is sharded twice, an axis is used twice, `pp` is among the axes, or the number
    /// of elements overflows (counted as if a dimension of 0 were 1).
    pub fn new(
        dims: &[usize],
        shards: &[(usize, Axes<V>)],
        partial: Axes<V>,
        owner: Owner,
    ) -> Result<Self, Error> {
        // A dimension of 0 does not hide the others: any product of some dimensions can then be counted.
        if dims.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim.max(1))).is_none() {
            return Err(Error::TooLarge { dims: dims.into() });
        }
        let mut used = partial;
        for (place, &(dim, axes)) in shards.iter().enumerate() {
            if dim >= dims.len() {
                return Err(Error::NoSuchDimension { dim, dims: dims.into() });
            }
            if shards[..place].iter().any(|(earlier, _)| *earlier == dim) {
                return Err(Error::ShardedTwice { dim });
            }
            if !axes.is_disjoint(used) {
                return Err(Error::AxesUsedTwice { axes: GroupKey::from(axes.intersect(used)) });
            }
            used = used | axes;
        }
        if !used.is_disjoint(Self::PP) {
            return Err(Error::OverStages);
        }
        Ok(Self { dims: dims.into(), shards: shards.into(), partial, owner })
    }

    /// The logical shape.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Which dimension is cut over which axes.
    #[must_use]
    pub fn shards(&self) -> &[(usize, Axes<V>)] {
        &self.shards
    }

    /// The axes over which the gradient must be summed.
    #[must_use]
    pub fn partial(&self) -> Axes<V> {
        self.partial
    }

    /// The part of [`partial`](Self::partial) that cuts a sharded optimizer's state: all of it within one optimizer
    /// instance.
    #[must_use]
    pub fn cut_axes(&self) -> Axes<V> {
        self.partial.minus(self.instance_axes())
    }

    /// The part of [`partial`](Self::partial) over which the optimizer instances each hold the whole state.
    #[must_use]
    pub fn instance_axes(&self) -> Axes<V> {
        self.partial.intersect(Axes::outer(DP))
    }

    /// The stage, or the two.
    #[must_use]
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// The axes, `pp` aside, over which there are identical copies.
    #[must_use]
    pub fn replicated(&self) -> Axes<V> {
        let sharded = self.shards.iter().fold(Axes::NONE, |all, (_, axes)| all | *axes);
        Axes::ALL.minus(sharded).minus(self.partial).minus(Self::PP)
    }

    /// Checks that the owner is a stage of `folding`.
    ///
    /// # Errors
    /// [`Error::NoSuchStage`].
    pub fn check(&self, folding: &Folding) -> Result<(), Error> {
        let pp = folding.size(Self::PP);
        let stage = match self.owner {
            Owner::Stage(stage) => stage,
            Owner::Tied(one, other) => one.max(other),
        };
        if stage < pp { Ok(()) } else { Err(Error::NoSuchStage { stage, pp }) }
    }

    /// Whether `rank` is in a stage that owns the tensor.
    #[must_use]
    pub fn holds(&self, folding: &Folding, rank: usize) -> bool {
        let stage = folding.stage(rank);
        match self.owner {
            Owner::Stage(owner) => stage == owner,
            Owner::Tied(one, other) => stage == one || stage == other,
        }
    }

    /// The ranks that sum the gradient with `rank`.
    #[must_use]
    pub fn partial_group(&self, folding: &Folding, rank: usize) -> Group<V> {
        folding.group(rank, self.partial)
    }

    /// `rank` and the rank of the other owning stage that stores the same elements; the gradient is summed over these
    /// two as well as over [`partial_group`](Self::partial_group). `None` if there is one copy, or no such stage
    /// ([`check`](Self::check)).
    #[must_use]
    pub fn tied_ranks(&self, folding: &Folding, rank: usize) -> Option<Ranks> {
        match self.owner {
            Owner::Tied(one, other)
                if one != other && self.holds(folding, rank) && self.check(folding).is_ok() =>
            {
                let stages = folding.group(rank, Attention::PP);
                let (first, last) = (stages.get(one.min(other)), stages.get(one.max(other)));
                let mut ranks = Ranks::one(first as u32);
                ranks.push(Digit { stride: (last - first) as u32, size: 2 });
                Some(ranks)
            }
            _ => None,
        }
    }

    /// Whether `rank` is the one, of those that hold the same elements, whose copy counts: in a norm, in a file.
    ///
    /// That is index 0 of the [`replicated`](Self::replicated) and the [`instance_axes`](Self::instance_axes), and the
    /// first stage of a tied tensor. Ranks that differ along the [`cut_axes`](Self::cut_axes) all count: once the
    /// gradient is reduced and cut over them, each for its [`zero_cut`](Self::zero_cut).
    #[must_use]
    pub fn counts(&self, folding: &Folding, rank: usize) -> bool {
        let first_owner = match self.owner {
            Owner::Stage(stage) => stage,
            Owner::Tied(one, other) => one.min(other),
        };
        let copies = self.replicated() | self.instance_axes();
        folding.stage(rank) == first_owner && folding.coordinate(rank, copies) == 0
    }
}
