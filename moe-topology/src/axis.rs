//! The axes of parallelism, as typed sets of one of the two views.

use std::fmt::{self, Debug, Display};
use std::hash::Hash;
use std::marker::PhantomData;
use std::ops::BitOr;

/// Indices among the axes of either view.
pub(crate) const DP: usize = 2;
pub(crate) const PP: usize = 3;

mod sealed {
    use crate::layout::Layout;
    use crate::{Attention, Expert, Folding};

    pub trait Sealed: Sized {
        /// This view's numbering of the ranks.
        fn layout(folding: &Folding) -> &Layout<Self>;
    }

    impl Sealed for Attention {
        fn layout(folding: &Folding) -> &Layout<Self> {
            &folding.attention
        }
    }

    impl Sealed for Expert {
        fn layout(folding: &Folding) -> &Layout<Self> {
            &folding.expert
        }
    }
}

/// One of the two ways to number the same ranks: [`Attention`] or [`Expert`].
///
/// The view is a type so that code which reduces over attention axes cannot be handed an expert group. The trait is
/// sealed: a folding has exactly two views.
pub trait View: sealed::Sealed + Copy + Debug + Eq + Ord + Hash + Send + Sync + 'static {
    /// The view's name in messages: `attention` or `expert`.
    const NAME: &'static str;
    /// The same as a value.
    const KIND: ViewKind;
    /// The names of the four axes, in the order of [`Folding::coordinates`](crate::Folding::coordinates).
    const AXES: [&'static str; 4];
    /// The groups that people speak of, and their names: the four axes, then the useful combinations.
    /// [`megatron`](crate::megatron) has Megatron's.
    const GROUPS: &'static [(&'static str, Axes<Self>)];
}

/// Which view, as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ViewKind {
    /// [`Attention`].
    Attention,
    /// [`Expert`].
    Expert,
}

/// The view of everything outside the experts: attention, norms, router, embedding, head.
///
/// Its axes are `tp`, `cp`, `dp`, `pp`. A type only: it has no values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attention {}

/// The view of the routed experts.
///
/// Its axes are `etp`, `ep`, `edp`, `pp`. A type only: it has no values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expert {}

impl View for Attention {
    const NAME: &'static str = "attention";
    const KIND: ViewKind = ViewKind::Attention;
    const AXES: [&'static str; 4] = ["tp", "cp", "dp", "pp"];
    const GROUPS: &'static [(&'static str, Axes<Self>)] = &[
        ("tp", Self::TP),
        ("cp", Self::CP),
        ("dp", Self::DP),
        ("pp", Self::PP),
        ("tp-cp", Self::TP.union(Self::CP)),
        ("dp-cp", Self::DP.union(Self::CP)),
        ("tp-pp", Self::TP.union(Self::PP)),
    ];
}

impl View for Expert {
    const NAME: &'static str = "expert";
    const KIND: ViewKind = ViewKind::Expert;
    const AXES: [&'static str; 4] = ["etp", "ep", "edp", "pp"];
    const GROUPS: &'static [(&'static str, Axes<Self>)] = &[
        ("etp", Self::ETP),
        ("ep", Self::EP),
        ("edp", Self::EDP),
        ("pp", Self::PP),
        ("etp-ep", Self::ETP.union(Self::EP)),
        ("etp-ep-pp", Self::ETP.union(Self::EP).union(Self::PP)),
    ];
}

impl Attention {
    /// Tensor parallelism: rows or columns of a matrix, attention heads, blocks of the vocabulary.
    pub const TP: Axes<Self> = Axes::axis(0);
    /// The inner digit of `TP`, for instance the replicas of a shared key-value head.
    pub const TP_INNER: Axes<Self> = Axes::inner(0);
    /// The outer digit of `TP`, for instance the distinct key-value heads.
    pub const TP_OUTER: Axes<Self> = Axes::outer(0);
    /// Context parallelism: chunks of the sequence.
    pub const CP: Axes<Self> = Axes::axis(1);
    /// The inner digit of `CP`, for instance Ulysses.
    pub const CP_INNER: Axes<Self> = Axes::inner(1);
    /// The outer digit of `CP`, for instance the ring around Ulysses.
    pub const CP_OUTER: Axes<Self> = Axes::outer(1);
    /// Data parallelism: sequences of the batch.
    pub const DP: Axes<Self> = Axes::axis(2);
    /// The inner digit of `DP`: the ranks of one optimizer instance.
    pub const DP_INNER: Axes<Self> = Axes::inner(2);
    /// The outer digit of `DP`: the optimizer instances.
    pub const DP_OUTER: Axes<Self> = Axes::outer(2);
    /// Pipeline parallelism: stages of layers. Its groups are those of [`Expert::PP`].
    pub const PP: Axes<Self> = Axes::axis(3);
    /// The inner digit of `PP`.
    pub const PP_INNER: Axes<Self> = Axes::inner(3);
    /// The outer digit of `PP`.
    pub const PP_OUTER: Axes<Self> = Axes::outer(3);
    /// All axes: the whole world.
    pub const ALL: Axes<Self> = Axes::ALL;
}

impl Expert {
    /// Expert tensor parallelism: rows or columns of one expert's matrices.
    pub const ETP: Axes<Self> = Axes::axis(0);
    /// The inner digit of `ETP`.
    pub const ETP_INNER: Axes<Self> = Axes::inner(0);
    /// The outer digit of `ETP`.
    pub const ETP_OUTER: Axes<Self> = Axes::outer(0);
    /// Expert parallelism: different experts.
    pub const EP: Axes<Self> = Axes::axis(1);
    /// The inner digit of `EP`, for instance the ranks of a node.
    pub const EP_INNER: Axes<Self> = Axes::inner(1);
    /// The outer digit of `EP`, for instance the nodes.
    pub const EP_OUTER: Axes<Self> = Axes::outer(1);
    /// Expert data parallelism: replicas of the same experts.
    pub const EDP: Axes<Self> = Axes::axis(2);
    /// The inner digit of `EDP`: the ranks of one optimizer instance.
    pub const EDP_INNER: Axes<Self> = Axes::inner(2);
    /// The outer digit of `EDP`: the optimizer instances.
    pub const EDP_OUTER: Axes<Self> = Axes::outer(2);
    /// Pipeline parallelism: stages of layers. Its groups are those of [`Attention::PP`].
    pub const PP: Axes<Self> = Axes::axis(3);
    /// The inner digit of `PP`.
    pub const PP_INNER: Axes<Self> = Axes::inner(3);
    /// The outer digit of `PP`.
    pub const PP_OUTER: Axes<Self> = Axes::outer(3);
    /// All axes: the whole world.
    pub const ALL: Axes<Self> = Axes::ALL;
}

/// A set of axes of one view.
///
/// Each axis is two digits, an inner (nearer ranks) and an outer one; [`Mapping::split`](crate::Mapping::split) gives
/// their sizes. An axis that is not split has all of its size in the inner digit, so whoever asks for `TP` or for `DP`
/// need not know whether it is split.
///
/// ```
/// use moe_topology::{Attention, Axes, Expert};
///
/// let axes = Attention::TP | Attention::CP;
/// assert!(axes.contains(Attention::TP_OUTER));
/// assert_eq!(axes.to_string(), "tp-cp");
/// assert_eq!(axes.minus(Attention::TP_INNER).to_string(), "tp.outer-cp");
/// assert_eq!(Axes::<Expert>::ALL.to_string(), "etp-ep-edp-pp");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Axes<V> {
    /// Bit `2·axis` is the inner digit, bit `2·axis + 1` the outer.
    bits: u8,
    view: PhantomData<V>,
}

impl<V: View> Axes<V> {
    /// No axis: every rank by itself.
    pub const NONE: Self = Self::from_bits(0);
    /// All axes: the whole world.
    pub const ALL: Self = Self::from_bits(0xff);

    const fn from_bits(bits: u8) -> Self {
        Self { bits, view: PhantomData }
    }

    pub(crate) const fn inner(axis: usize) -> Self {
        Self::from_bits(0b01 << (2 * axis))
    }

    pub(crate) const fn outer(axis: usize) -> Self {
        Self::from_bits(0b10 << (2 * axis))
    }

    pub(crate) const fn axis(axis: usize) -> Self {
        Self::from_bits(0b11 << (2 * axis))
    }

    /// Every axis of which a digit is in the set.
    pub(crate) const fn whole_axes(self) -> Self {
        Self::from_bits(self.bits | self.bits << 1 & 0xaa | self.bits >> 1 & 0x55)
    }

    /// Whether digit `digit` (`2·axis`, or `2·axis + 1` for the outer one) is in the set.
    pub(crate) const fn has_digit(self, digit: usize) -> bool {
        self.bits >> digit & 1 == 1
    }

    /// The axes in either set; `|` does the same outside constants.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self::from_bits(self.bits | other.bits)
    }

    /// The axes in both sets.
    #[must_use]
    pub const fn intersect(self, other: Self) -> Self {
        Self::from_bits(self.bits & other.bits)
    }

    /// The axes of this set that are not in the other.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self::from_bits(self.bits & !other.bits)
    }

    /// Whether all of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        other.minus(self).is_empty()
    }

    /// Whether no axis is in both sets.
    #[must_use]
    pub const fn is_disjoint(self, other: Self) -> bool {
        self.intersect(other).is_empty()
    }

    /// Whether there is no axis in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.bits == 0
    }

    /// The part of the set in each axis, in the order of [`View::AXES`], without the empty ones.
    pub fn iter(self) -> impl Iterator<Item = Self> {
        (0..4).map(move |axis| self.intersect(Self::axis(axis))).filter(|part| !part.is_empty())
    }
}

impl<V: View> BitOr for Axes<V> {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl<V: View> Display for Axes<V> {
    /// `tp-cp`, with `tp.inner` and `tp.outer` for single digits; `none` for no axis.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        for (axis, name) in V::AXES.into_iter().enumerate() {
            let digits = match (self.has_digit(2 * axis), self.has_digit(2 * axis + 1)) {
                (true, true) => "",
                (true, false) => ".inner",
                (false, true) => ".outer",
                (false, false) => continue,
            };
            write!(f, "{separator}{name}{digits}")?;
            separator = "-";
        }
        Ok(())
    }
}

impl<V: View> Debug for Axes<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Axes({self})")
    }
}

/// Axes whose view is a value: what a communicator is called, in registries and in messages.
///
/// ```
/// use moe_topology::{Attention, Expert, GroupKey};
///
/// let key = GroupKey::from(Attention::TP | Attention::CP);
/// assert_eq!(key.to_string(), "attention tp-cp");
/// assert_eq!(key.axes::<Attention>(), Some(Attention::TP | Attention::CP));
/// assert_eq!(key.axes::<Expert>(), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GroupKey {
    /// Axes of the attention view.
    Attention(Axes<Attention>),
    /// Axes of the expert view.
    Expert(Axes<Expert>),
}

impl GroupKey {
    /// The axes, if they belong to view `V`.
    #[must_use]
    pub fn axes<V: View>(self) -> Option<Axes<V>> {
        match (self, V::KIND) {
            (Self::Attention(Axes { bits, .. }), ViewKind::Attention)
            | (Self::Expert(Axes { bits, .. }), ViewKind::Expert) => Some(Axes::from_bits(bits)),
            _ => None,
        }
    }
}

impl<V: View> From<Axes<V>> for GroupKey {
    fn from(axes: Axes<V>) -> Self {
        match V::KIND {
            ViewKind::Attention => Self::Attention(Axes::from_bits(axes.bits)),
            ViewKind::Expert => Self::Expert(Axes::from_bits(axes.bits)),
        }
    }
}

impl Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attention(axes) => write!(f, "{} {axes}", Attention::NAME),
            Self::Expert(axes) => write!(f, "{} {axes}", Expert::NAME),
        }
    }
}

impl Debug for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GroupKey({self})")
    }
}
