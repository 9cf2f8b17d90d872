//! What a user writes: sizes of the axes and their order.

use std::fmt;
use std::str::FromStr;

use smallvec::SmallVec;

use crate::{Attention, Axes, Error, Expert, GroupKey, View, ViewKind};

/// The sizes of the parallel axes of a world, as a user writes them; [`Folding::new`](crate::Folding::new) judges them.
///
/// `dp` and `edp` follow: `dp = world_size/(tp·cp·pp)` and `edp = world_size/(etp·ep·pp)`. Build it with
/// `..Mapping::default()`, as here: fields may be added in a minor release.
///
/// ```
/// use moe_topology::{Folding, Mapping};
///
/// let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
/// let folding = Folding::new(mapping)?;
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Number of ranks.
    pub world_size: usize,
    /// Tensor parallelism of everything outside the experts.
    pub tp: usize,
    /// Context parallelism.
    pub cp: usize,
    /// Pipeline parallelism, common to both views.
    pub pp: usize,
    /// Expert parallelism.
    pub ep: usize,
    /// Tensor parallelism inside an expert. **1 unless given.** (In Megatron-LM an expert tensor parallelism that is
    /// not given equals `tp`, so that its TP8·EP8 needs 64 ranks. Here it needs 8.)
    pub etp: usize,
    /// Which axis has stride 1, and so on.
    pub order: Order,
    /// Axes that are two digits; see [`split`](Self::split).
    pub splits: Splits,
}

impl Default for Mapping {
    /// One rank: every size is 1.
    fn default() -> Self {
        Self {
            world_size: 1,
            tp: 1,
            cp: 1,
            pp: 1,
            ep: 1,
            etp: 1,
            order: Order::default(),
            splits: Splits::default(),
        }
    }
}

impl Mapping {
    /// Makes an axis two digits, of which `digit` has this size and the other one the rest.
    ///
    /// For instance `split(Attention::CP_INNER, 4)` makes CP 8 a ring of 2 around Ulysses of 4, and, where 8 ranks of
    /// TP share 2 key-value heads, `split(Attention::TP_OUTER, 2)` lets a placement shard over `TP_OUTER` and sum
    /// over `TP_INNER`. The last split of an axis counts.
    #[must_use]
    pub fn split<V: View>(mut self, digit: Axes<V>, size: usize) -> Self {
        let same = |axes: Axes<V>| axes == digit || !axes.whole_axes().is_disjoint(digit);
        self.splits.0.retain(|(key, _)| !key.axes().is_some_and(same));
        self.splits.0.push((digit.into(), size));
        self
    }

    /// Cuts the data-parallel replicas into `instances` of the sharded optimizer: the outer digits of `DP` and `EDP`.
    ///
    /// `instances` must divide `dp` and `edp`, and an instance is the same ranks in both views, which an order that has
    /// `dp` before `cp` or `ep` may refuse. (Megatron-LM asks that it divide `dp·cp` and `edp`; it would cut through a
    /// context-parallel group where this is refused.)
    #[must_use]
    pub fn optimizer_instances(self, instances: usize) -> Self {
        self.split(Attention::DP_OUTER, instances).split(Expert::EDP_OUTER, instances)
    }
}

impl fmt::Display for Mapping {
    /// `tp 2, cp 1, pp 8, ep 8, etp 1`, followed by the order and the splits where they are not the default.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tp, cp, pp, ep, etp, order, splits, .. } = self;
        write!(f, "tp {tp}, cp {cp}, pp {pp}, ep {ep}, etp {etp}")?;
        if *order != Order::default() {
            write!(f, ", order {order}")?;
        }
        for (digit, size) in splits.iter() {
            write!(f, ", {digit} {size}")?;
        }
        Ok(())
    }
}

/// The axes that [`Mapping::split`] made two digits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Splits(SmallVec<[(GroupKey, usize); 2]>);

impl Splits {
    /// The digits that were given a size, in the order they were.
    pub fn iter(&self) -> impl Iterator<Item = (GroupKey, usize)> {
        self.0.iter().copied()
    }

    pub(crate) fn remove(&mut self, digit: GroupKey) {
        self.0.retain(|(key, _)| *key != digit);
    }
}

/// A name in an [`Order`]. Each stands for its axis in both views.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Token {
    /// `tp` or `etp`.
    Tp,
    /// `cp`, in the attention view only.
    Cp,
    /// `ep`, in the expert view only.
    Ep,
    /// `dp` or `edp`.
    Dp,
    /// `pp`.
    Pp,
}

impl Token {
    pub(crate) const ALL: [Self; 5] = [Self::Tp, Self::Cp, Self::Ep, Self::Dp, Self::Pp];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tp => "tp",
            Self::Cp => "cp",
            Self::Ep => "ep",
            Self::Dp => "dp",
            Self::Pp => "pp",
        }
    }

    /// Its axis in a view, as an index of [`View::AXES`].
    pub(crate) fn axis(self, view: ViewKind) -> Option<usize> {
        match (self, view) {
            (Self::Tp, _) => Some(0),
            (Self::Cp, ViewKind::Attention) | (Self::Ep, ViewKind::Expert) => Some(1),
            (Self::Ep, ViewKind::Attention) | (Self::Cp, ViewKind::Expert) => None,
            (Self::Dp, _) => Some(2),
            (Self::Pp, _) => Some(3),
        }
    }
}

/// The order of the axes, the one with stride 1 first: `tp-cp-ep-dp-pp`.
///
/// `etp` goes with `tp` and `edp` with `dp`. Names are whole tokens, each at most once; one that is left out must have
/// size 1.
///
/// ```
/// use moe_topology::Order;
///
/// assert_eq!("tp-cp-ep-dp-pp".parse::<Order>()?, Order::default());
/// assert_eq!("tp-cp-ep-pp-dp".parse::<Order>()?, Order::DP_LAST);
/// assert!("tp-cp-tp".parse::<Order>().is_err());
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Order {
    tokens: [Token; 5],
    /// How many of them were written; the rest are the missing ones.
    written: u8,
}

impl Order {
    /// `tp-cp-ep-dp-pp`: stages are blocks of consecutive ranks, and any folding is legal.
    pub const PP_LAST: Self = Self { tokens: Token::ALL, written: 5 };
    /// `tp-cp-ep-pp-dp`, Megatron-LM's `--use-tp-pp-dp-mapping`: a folding needs `tp·cp = etp·ep`, or `pp = 1`.
    pub const DP_LAST: Self =
        Self { tokens: [Token::Tp, Token::Cp, Token::Ep, Token::Pp, Token::Dp], written: 5 };

    /// The axes of a view, the fastest first.
    pub(crate) fn axes(self, view: ViewKind) -> [usize; 4] {
        let mut axes = [0; 4];
        for (place, axis) in self.tokens.into_iter().filter_map(|token| token.axis(view)).enumerate() {
            axes[place] = axis;
        }
        axes
    }

    /// The tokens that were written, and those that were not.
    pub(crate) fn split(&self) -> (&[Token], &[Token]) {
        self.tokens.split_at(usize::from(self.written))
    }
}

impl Default for Order {
    /// [`PP_LAST`](Self::PP_LAST).
    fn default() -> Self {
        Self::PP_LAST
    }
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(order: &str) -> Result<Self, Error> {
        let mut tokens = SmallVec::<[Token; 5]>::new();
        for name in order.split('-') {
            let token = Token::ALL
                .into_iter()
                .find(|token| token.name() == name)
                .ok_or_else(|| Error::UnknownAxis { name: name.to_owned(), order: order.to_owned() })?;
            if tokens.contains(&token) {
                return Err(Error::RepeatedAxis { name: token.name(), order: order.to_owned() });
            }
            tokens.push(token);
        }
        let written = tokens.len() as u8;
        for token in Token::ALL {
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
        Ok(Self { tokens: std::array::from_fn(|place| tokens[place]), written })
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (written, _) = self.split();
        for (place, token) in written.iter().enumerate() {
            write!(f, "{}{}", if place == 0 { "" } else { "-" }, token.name())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Order({self})")
    }
}
