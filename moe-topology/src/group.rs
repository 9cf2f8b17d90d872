//! Groups of ranks as arithmetic: made, tested and iterated without allocation.

use std::fmt;
use std::iter::FusedIterator;
use std::ops::Range;

use crate::{Axes, GroupKey, View};

/// One place of a mixed-radix number: `size` values, `stride` ranks apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digit {
    pub stride: u32,
    pub size: u32,
}

/// A layout has eight digits, and neighbours of a group merge: at most every other one begins a new digit.
const MAX_DIGITS: usize = 4;

/// Ranks `base + Σ dᵢ·strideᵢ` for `0 ≤ dᵢ < sizeᵢ`, ascending.
///
/// Digits that continue each other are merged, so equal sets of ranks are equal values: two groups of different axes,
/// or of different views, that hold the same ranks have equal `Ranks` and can share one communicator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ranks {
    base: u32,
    len: u32,
    /// Strides ascend; each is a multiple of the span of all before it. Unused places are zero.
    digits: [Digit; MAX_DIGITS],
    used: u8,
}

impl Ranks {
    /// One rank.
    pub(crate) fn one(base: u32) -> Self {
        Self { base, len: 1, digits: [Digit::default(); MAX_DIGITS], used: 0 }
    }

    /// Adds a digit whose stride is a multiple of the span of those before it.
    pub(crate) fn push(&mut self, digit: Digit) {
        if digit.size == 1 {
            return;
        }
        self.len *= digit.size;
        match self.digits[..usize::from(self.used)].last_mut() {
            Some(last) if last.stride * last.size == digit.stride => last.size *= digit.size,
            _ => {
                self.digits[usize::from(self.used)] = digit;
                self.used += 1;
            }
        }
    }

    /// The same pattern from another first rank.
    pub(crate) fn at(mut self, base: usize) -> Self {
        self.base = base as u32;
        self
    }

    fn digits(&self) -> &[Digit] {
        &self.digits[..usize::from(self.used)]
    }

    /// Number of ranks, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The rank at position `index`.
    ///
    /// # Panics
    /// If `index >= self.len()`, as indexing a slice does.
    #[must_use]
    pub fn get(&self, index: usize) -> usize {
        assert!(index < self.len(), "position {index} of {} ranks", self.len);
        let (mut rank, mut rest) = (self.base, index as u32);
        for digit in self.digits() {
            rank += rest % digit.size * digit.stride;
            rest /= digit.size;
        }
        rank as usize
    }

    /// The first, smallest rank.
    #[must_use]
    pub fn first(&self) -> usize {
        self.base as usize
    }

    /// The last, largest rank.
    #[must_use]
    pub fn last(&self) -> usize {
        self.get(self.len() - 1)
    }

    /// Where `rank` stands, or `None` if it does not belong: the inverse of [`get`](Self::get).
    #[must_use]
    pub fn position(&self, rank: usize) -> Option<usize> {
        let mut rest = u32::try_from(rank).ok()?.checked_sub(self.base)?;
        let (mut position, mut weight) = (0, self.len);
        for digit in self.digits().iter().rev() {
            let value = rest / digit.stride;
            if value >= digit.size {
                return None;
            }
            rest %= digit.stride;
            weight /= digit.size;
            position += value * weight;
        }
        (rest == 0).then_some(position as usize)
    }

    /// Whether `rank` belongs.
    #[must_use]
    pub fn contains(&self, rank: usize) -> bool {
        self.position(rank).is_some()
    }

    /// The ranks, ascending.
    #[must_use]
    pub fn iter(&self) -> RanksIter {
        RanksIter { ranks: *self, left: 0..self.len() }
    }
}

impl IntoIterator for Ranks {
    type Item = usize;
    type IntoIter = RanksIter;
    fn into_iter(self) -> RanksIter {
        self.iter()
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ranks({}", self.base)?;
        for Digit { stride, size } in self.digits() {
            write!(f, " + {stride}·(0..{size})")?;
        }
        f.write_str(")")
    }
}

/// The ranks of a group, ascending; allocates nothing.
#[derive(Clone, Debug)]
pub struct RanksIter {
    ranks: Ranks,
    left: Range<usize>,
}

impl Iterator for RanksIter {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left.next().map(|index| self.ranks.get(index))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.left.size_hint()
    }

    fn nth(&mut self, n: usize) -> Option<usize> {
        self.left.nth(n).map(|index| self.ranks.get(index))
    }
}

impl DoubleEndedIterator for RanksIter {
    fn next_back(&mut self) -> Option<usize> {
        self.left.next_back().map(|index| self.ranks.get(index))
    }
}

impl ExactSizeIterator for RanksIter {}
impl FusedIterator for RanksIter {}

/// The ranks that agree with one rank on every axis of view `V` except [`axes`](Self::axes).
///
/// Made by [`Folding::group`](crate::Folding::group). Positions ascend with the ranks, as Megatron's do.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group<V> {
    ranks: Ranks,
    axes: Axes<V>,
}

impl<V: View> Group<V> {
    pub(crate) fn new(ranks: Ranks, axes: Axes<V>) -> Self {
        Self { ranks, axes }
    }

    /// The ranks without the view. Equal sets are equal values.
    #[must_use]
    pub fn ranks(&self) -> Ranks {
        self.ranks
    }

    /// The axes along which the members differ.
    #[must_use]
    pub fn axes(&self) -> Axes<V> {
        self.axes
    }

    /// The kind of group, with the view as a value.
    #[must_use]
    pub fn key(&self) -> GroupKey {
        self.axes.into()
    }

    /// Number of ranks, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// The rank at position `index`.
    ///
    /// # Panics
    /// If `index >= self.len()`, as indexing a slice does.
    #[must_use]
    pub fn get(&self, index: usize) -> usize {
        self.ranks.get(index)
    }

    /// Where `rank` stands, or `None` if it does not belong: the inverse of [`get`](Self::get).
    #[must_use]
    pub fn position(&self, rank: usize) -> Option<usize> {
        self.ranks.position(rank)
    }

    /// Whether `rank` belongs.
    #[must_use]
    pub fn contains(&self, rank: usize) -> bool {
        self.ranks.contains(rank)
    }

    /// The ranks, ascending.
    #[must_use]
    pub fn iter(&self) -> RanksIter {
        self.ranks.iter()
    }
}

impl<V: View> IntoIterator for Group<V> {
    type Item = usize;
    type IntoIter = RanksIter;
    fn into_iter(self) -> RanksIter {
        self.iter()
    }
}

impl<V: View> fmt::Debug for Group<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({}: {:?})", self.key(), self.ranks)
    }
}
