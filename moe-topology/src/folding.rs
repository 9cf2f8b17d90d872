//! Two layouts over the same ranks with the same pipeline groups.

use crate::axis::{DP, PP};
use crate::error::{Product, Rule};
use crate::layout::Layout;
use crate::{Attention, Axes, Constraints, Error, Expert, Group, GroupKey, Mapping, Order, Ranks, View};

/// A legal folding: the [`Attention`] and the [`Expert`] view of the same ranks, with identical pipeline groups and
/// optimizer instances.
///
/// ```
/// use moe_topology::{Attention, Expert, Folding, Mapping};
///
/// let mapping = Mapping { world_size: 16, tp: 2, cp: 2, pp: 2, ep: 4, ..Mapping::default() };
/// let folding = Folding::new(mapping)?;
/// assert_eq!(folding.size(Attention::DP), 2);
///
/// // The experts' all-to-all runs over the ranks that attention uses for TP×CP.
/// let ep = folding.group(5, Expert::EP);
/// assert!(ep.iter().eq([4, 5, 6, 7]));
/// assert_eq!(ep.position(5), Some(1));
/// assert_eq!(ep.ranks(), folding.group(5, Attention::TP | Attention::CP).ranks());
/// # Ok::<(), moe_topology::Error>(())
/// ```
///
/// A group of one view is not a group of the other:
///
/// ```compile_fail,E0308
/// use moe_topology::{Attention, Expert, Folding, Group, Mapping};
///
/// fn reduce_dense_gradient(group: Group<Attention>) {}
///
/// let folding = Folding::new(Mapping::default()).unwrap();
/// reduce_dense_gradient(folding.group(0, Expert::EDP)); // expected `Group<Attention>`, found `Group<Expert>`
/// ```
///
/// nor can their axes be mixed:
///
/// ```compile_fail,E0308
/// use moe_topology::{Attention, Expert};
///
/// let axes = Attention::DP | Expert::EP;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folding {
    mapping: Mapping,
    pub(crate) attention: Layout<Attention>,
    pub(crate) expert: Layout<Expert>,
}

impl Folding {
    /// Folds the world as the mapping says.
    ///
    /// A mapping is legal if every size is at least 1; `world_size % (tp·cp·pp) = 0` and
    /// `world_size % (etp·ep·pp) = 0`; an axis left out of the order has size 1; splits divide their axes; the pipeline
    /// groups of both views are the same, that is, the sizes before `pp` in the order multiply to the same in both
    /// (always so when `pp` is last); and so are the optimizer instances, the outer digits of `dp` and `edp`: as many,
    /// and the sizes up to `dp` multiply to the same (always so when `dp` comes after `tp`, `cp` and `ep`).
    /// [`Constraints::fold`] adds the rules of a model and a batch.
    ///
    /// # Errors
    /// [`Error::Illegal`] with the equation, the values and the nearest legal mappings.
    pub fn new(mapping: Mapping) -> Result<Self, Error> {
        Constraints::default().fold(mapping)
    }

    /// [`new`](Self::new) without looking for nearest mappings.
    pub(crate) fn build(mapping: Mapping) -> Result<Self, Rule> {
        let Mapping { world_size, tp, cp, pp, ep, etp, order, .. } = mapping;
        for (name, size) in
            [("world_size", world_size), ("tp", tp), ("cp", cp), ("pp", pp), ("ep", ep), ("etp", etp)]
        {
            if size == 0 {
                return Err(Rule::Zero { name });
            }
        }
        if u32::try_from(world_size).is_err() {
            return Err(Rule::TooMany { world_size });
        }
        let dp = replicas(world_size, [("tp", tp), ("cp", cp), ("pp", pp)])?;
        let edp = replicas(world_size, [("etp", etp), ("ep", ep), ("pp", pp)])?;
        let (attention, expert) = ([tp, cp, dp, pp], [etp, ep, edp, pp]);
        let folding =
            Self { attention: layout(&mapping, attention)?, expert: layout(&mapping, expert)?, mapping };
        let [stage, instance] = folding.attention.shared();
        let [expert_stage, expert_instance] = folding.expert.shared();
        if stage != expert_stage {
            return Err(Rule::PipelineGroups {
                order,
                attention: before::<Attention>(order, PP, attention),
                expert: before::<Expert>(order, PP, expert),
            });
        }
        if instance != expert_instance {
            let (attention, expert) =
                match (folding.size(Attention::DP_OUTER), folding.size(Expert::EDP_OUTER)) {
                    (one, other) if one != other => {
                        (Product::new(&[("dp.outer", one)]), Product::new(&[("edp.outer", other)]))
                    }
                    _ => (
                        before::<Attention>(order, DP, attention).times("dp", dp),
                        before::<Expert>(order, DP, expert).times("edp", edp),
                    ),
                };
            return Err(Rule::OptimizerInstances { order, attention, expert });
        }
        Ok(folding)
    }

    /// What the user wrote.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Number of ranks.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.mapping.world_size
    }

    /// Number of ranks in a group over `axes`: the product of their sizes.
    #[must_use]
    pub fn size<V: View>(&self, axes: Axes<V>) -> usize {
        V::layout(self).size(axes)
    }

    /// The position of `rank` in its group over `axes`: its digits along them as one mixed-radix number.
    ///
    /// # Panics
    /// If `rank >= self.world_size()`, as indexing a slice does.
    #[must_use]
    pub fn coordinate<V: View>(&self, rank: usize, axes: Axes<V>) -> usize {
        V::layout(self).coordinate(rank, axes)
    }

    /// The four coordinates of `rank`: `[tp, cp, dp, pp]` or `[etp, ep, edp, pp]`.
    ///
    /// # Panics
    /// If `rank >= self.world_size()`, as indexing a slice does.
    #[must_use]
    pub fn coordinates<V: View>(&self, rank: usize) -> [usize; 4] {
        V::layout(self).coordinates(rank)
    }

    /// The rank with these coordinates, the inverse of [`coordinates`](Self::coordinates); `None` if one is too large.
    #[must_use]
    pub fn rank_at<V: View>(&self, coordinates: [usize; 4]) -> Option<usize> {
        V::layout(self).rank_at(coordinates)
    }

    /// The group of `rank` over `axes`: the ranks that agree with it on all other axes of the view.
    ///
    /// # Panics
    /// If `rank >= self.world_size()`, as indexing a slice does.
    #[must_use]
    pub fn group<V: View>(&self, rank: usize, axes: Axes<V>) -> Group<V> {
        V::layout(self).group(rank, axes)
    }

    /// The group of `rank` over axes whose view is a value, as a registry of communicators has them.
    ///
    /// # Panics
    /// If `rank >= self.world_size()`, as indexing a slice does.
    #[must_use]
    pub fn ranks(&self, rank: usize, key: GroupKey) -> Ranks {
        match key {
            GroupKey::Attention(axes) => self.group(rank, axes).ranks(),
            GroupKey::Expert(axes) => self.group(rank, axes).ranks(),
        }
    }

    /// All groups over `axes`, ascending by their first ranks: a partition of the world.
    #[must_use]
    pub fn groups<V: View>(&self, axes: Axes<V>) -> impl ExactSizeIterator<Item = Group<V>> {
        self.groups_within(self.group(0, Axes::ALL), axes)
    }

    /// The groups over `axes` that make up `parent`, ascending by their first ranks: a partition of it.
    ///
    /// Axes that `parent` does not span have no effect.
    #[must_use]
    pub fn groups_within<V: View>(
        &self,
        parent: Group<V>,
        axes: Axes<V>,
    ) -> impl ExactSizeIterator<Item = Group<V>> {
        V::layout(self).groups_within(parent, axes)
    }

    /// The pipeline stage of `rank`, the same in both views.
    ///
    /// # Panics
    /// If `rank >= self.world_size()`, as indexing a slice does.
    #[must_use]
    pub fn stage(&self, rank: usize) -> usize {
        self.coordinate(rank, Attention::PP)
    }
}

/// `world_size` over the product of three axes.
fn replicas(world_size: usize, axes: [(&'static str, usize); 3]) -> Result<usize, Rule> {
    let product = axes.iter().try_fold(1usize, |product, (_, size)| product.checked_mul(*size));
    match product {
        Some(product) if world_size.is_multiple_of(product) => Ok(world_size / product),
        _ => Err(Rule::Multiple { name: "world_size", value: world_size, of: Product::new(&axes) }),
    }
}

/// The layout of one view, given the sizes of its axes, which multiply to the world's.
pub(crate) fn layout<V: View>(mapping: &Mapping, sizes: [usize; 4]) -> Result<Layout<V>, Rule> {
    let (_, missing) = mapping.order.split();
    for axis in missing.iter().filter_map(|token| token.axis(V::KIND)) {
        if sizes[axis] != 1 {
            return Err(Rule::Unordered { name: V::AXES[axis], size: sizes[axis], order: mapping.order });
        }
    }

    let mut inner = sizes;
    for (key, size) in mapping.splits.iter() {
        let Some(digit) = key.axes::<V>() else { continue };
        let Some(axis) = (0..4).find(|&axis| digit == Axes::inner(axis) || digit == Axes::outer(axis)) else {
            return Err(Rule::NotADigit { axes: key });
        };
        let is_inner = digit == Axes::inner(axis);
        if size == 0 {
            return Err(Rule::EmptyDigit { digit: key });
        }
        if !sizes[axis].is_multiple_of(size) {
            let name = if is_inner { "its inner digit" } else { "its outer digit" };
            let of = Product::new(&[(name, size)]);
            return Err(Rule::Multiple { name: V::AXES[axis], value: sizes[axis], of });
        }
        inner[axis] = if is_inner { size } else { sizes[axis] / size };
    }
    // Every size divides a world of fewer than 2^32 ranks.
    let order = mapping.order.axes(V::KIND);
    Ok(Layout::new(sizes.map(|size| size as u32), inner.map(|size| size as u32), order))
}

/// The sizes that make up the stride of `until`.
fn before<V: View>(order: Order, until: usize, sizes: [usize; 4]) -> Product {
    let axes = order.axes(V::KIND).into_iter().take_while(|&axis| axis != until);
    axes.fold(Product::new(&[]), |product, axis| product.times(V::AXES[axis], sizes[axis]))
}
