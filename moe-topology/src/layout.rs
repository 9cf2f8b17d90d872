//! A mixed-radix numbering of the ranks.

use std::marker::PhantomData;

use crate::axis::{DP, PP};
use crate::group::{Digit, Ranks};
use crate::{Axes, Group, View};

/// An ordered list of digits, the first with stride 1, whose sizes multiply to the number of ranks.
///
/// Four axes of two digits each. A [`Folding`](crate::Folding) holds one layout per view over the same ranks, and asks
/// it for all of its rank arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout<V> {
    /// At `2·axis` the inner digit, at `2·axis + 1` the outer.
    digits: [Digit; 8],
    /// Indices of `digits` by ascending stride.
    by_stride: [u8; 8],
    world_size: u32,
    view: PhantomData<V>,
}

impl<V: View> Layout<V> {
    /// `sizes[axis]` is the size of an axis and `inner[axis]`, which divides it, that of its inner digit;
    /// `order` lists the axes, the fastest first. The product of the sizes fits `u32`.
    pub(crate) fn new(sizes: [u32; 4], inner: [u32; 4], order: [usize; 4]) -> Self {
        let mut digits = [Digit::default(); 8];
        let mut by_stride = [0; 8];
        let mut stride = 1;
        for (place, axis) in order.into_iter().enumerate() {
            let outer = sizes[axis] / inner[axis];
            digits[2 * axis] = Digit { stride, size: inner[axis] };
            digits[2 * axis + 1] = Digit { stride: stride * inner[axis], size: outer };
            by_stride[2 * place] = 2 * axis as u8;
            by_stride[2 * place + 1] = 2 * axis as u8 + 1;
            stride *= sizes[axis];
        }
        Self { digits, by_stride, world_size: stride, view: PhantomData }
    }

    /// The digits of `axes`, by ascending stride.
    fn select(&self, axes: Axes<V>) -> impl Iterator<Item = Digit> {
        self.by_stride
            .into_iter()
            .map(usize::from)
            .filter(move |&digit| axes.has_digit(digit))
            .map(|digit| self.digits[digit])
    }

    /// Ranks come from the caller: one that does not exist panics, as an index into a slice would.
    fn checked(&self, rank: usize) -> u32 {
        assert!(rank < self.world_size as usize, "rank {rank} in a world of {} ranks", self.world_size);
        rank as u32
    }

    /// What the two layouts of a folding must have in common: the digits of a rank that number its pipeline stage and
    /// its optimizer instance. Where there is but one, it does not matter where its digit stands.
    pub(crate) fn shared(&self) -> [Digit; 2] {
        let [inner, outer, instance] = [2 * PP, 2 * PP + 1, 2 * DP + 1].map(|digit| self.digits[digit]);
        let stage = Digit { stride: inner.stride, size: inner.size * outer.size };
        [stage, instance].map(|digit| if digit.size == 1 { Digit::default() } else { digit })
    }

    /// Ranks between neighbours along `axis`.
    fn stride(&self, axis: usize) -> usize {
        self.digits[2 * axis].stride as usize
    }

    /// Number of ranks in a group over `axes`: the product of their sizes.
    pub(crate) fn size(&self, axes: Axes<V>) -> usize {
        self.select(axes).map(|digit| digit.size as usize).product()
    }

    /// The position of `rank` in its group over `axes`: its digits along them as one mixed-radix number.
    pub(crate) fn coordinate(&self, rank: usize, axes: Axes<V>) -> usize {
        let rank = self.checked(rank);
        let (mut coordinate, mut weight) = (0, 1);
        for Digit { stride, size } in self.select(axes) {
            coordinate += rank / stride % size * weight;
            weight *= size;
        }
        coordinate as usize
    }

    /// The ranks that agree with `rank` on all axes but `axes`.
    pub(crate) fn group(&self, rank: usize, axes: Axes<V>) -> Group<V> {
        let rank = self.checked(rank);
        let mut offset = 0;
        let mut ranks = Ranks::one(0);
        for digit in self.select(axes) {
            offset += rank / digit.stride % digit.size * digit.stride;
            ranks.push(digit);
        }
        Group::new(ranks.at((rank - offset) as usize), axes)
    }

    /// All groups over `axes` inside `parent`, ascending by their first ranks.
    ///
    /// The first ranks of these groups form themselves a group: over the axes of `parent` that are not in `axes`.
    pub(crate) fn groups_within(
        &self,
        parent: Group<V>,
        axes: Axes<V>,
    ) -> impl ExactSizeIterator<Item = Group<V>> {
        let pattern = self.group(parent.ranks().first(), axes.intersect(parent.axes()));
        let firsts = self.group(parent.ranks().first(), parent.axes().minus(axes));
        firsts.iter().map(move |first| Group::new(pattern.ranks().at(first), pattern.axes()))
    }

    /// The four coordinates of `rank`, in the order of [`View::AXES`].
    pub(crate) fn coordinates(&self, rank: usize) -> [usize; 4] {
        std::array::from_fn(|axis| self.coordinate(rank, Axes::axis(axis)))
    }

    /// The rank with these coordinates, in the order of [`View::AXES`]; `None` if one is out of range.
    pub(crate) fn rank_at(&self, coordinates: [usize; 4]) -> Option<usize> {
        let mut rank = 0;
        for (axis, coordinate) in coordinates.into_iter().enumerate() {
            if coordinate >= self.size(Axes::axis(axis)) {
                return None;
            }
            rank += coordinate * self.stride(axis);
        }
        Some(rank)
    }
}
