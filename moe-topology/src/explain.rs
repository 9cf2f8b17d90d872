//! The legal mappings nearest to an illegal one.

use std::fmt;

use crate::enumerate::enumerate_like;
use crate::{Constraints, Mapping, Order};

/// How many mappings are proposed.
const AT_MOST: usize = 5;

/// The legal mappings of the same world nearest to what was asked: those that change the fewest numbers (the order
/// counts as one), and among them those that change them the least in sum. At most five, the nearest first; the same
/// input gives the same answer.
///
/// If `asked` is legal it is the only answer.
///
/// ```
/// use moe_topology::{Constraints, Mapping, nearest};
///
/// // Megatron's default, ETP = TP, needs 64 ranks for TP8·EP8.
/// let asked = Mapping { world_size: 8, tp: 8, ep: 8, etp: 8, ..Mapping::default() };
/// let legal = nearest(&asked, &Constraints::default());
/// assert_eq!(legal[0], Mapping { ep: 1, ..asked.clone() });
/// assert_eq!(legal[1], Mapping { etp: 1, ..asked.clone() });
/// ```
#[must_use]
pub fn nearest(asked: &Mapping, constraints: &Constraints) -> Vec<Mapping> {
    for changes in 0..=Free::COUNT {
        let mut found: Vec<(usize, Mapping)> = Vec::new();
        for free in Free::sets_of(changes) {
            let Some((template, constraints)) = free.search(asked, constraints) else { continue };
            for folding in enumerate_like(&template, &constraints) {
                let legal = folding.mapping();
                if !free.all_changed(asked, legal) {
                    continue;
                }
                let distance = distance(asked, legal);
                let place = found.partition_point(|(known, _)| *known <= distance);
                if place < AT_MOST {
                    found.insert(place, (distance, legal.clone()));
                    found.truncate(AT_MOST);
                }
            }
        }
        if !found.is_empty() {
            return found.into_iter().map(|(_, mapping)| mapping).collect();
        }
    }
    Vec::new()
}

fn sizes(mapping: &Mapping) -> [usize; 5] {
    [mapping.tp, mapping.cp, mapping.pp, mapping.ep, mapping.etp]
}

/// How far the sizes are apart, in sum.
fn distance(asked: &Mapping, legal: &Mapping) -> usize {
    sizes(asked).iter().zip(sizes(legal)).fold(0, |sum, (a, b)| sum.saturating_add(a.abs_diff(b)))
}

/// Which numbers of a mapping may change: bits 0 to 4 in the order of [`sizes`], bit 5 the order.
#[derive(Clone, Copy)]
struct Free(u8);

impl Free {
    const COUNT: u32 = 6;
    const ORDER: usize = 5;

    fn sets_of(count: u32) -> impl Iterator<Item = Self> {
        (0u8..1 << Self::COUNT).filter(move |bits| bits.count_ones() == count).map(Self)
    }

    fn has(self, place: usize) -> bool {
        self.0 >> place & 1 == 1
    }

    /// Where to look: all else pinned to what was asked. `None` if that excludes everything.
    fn search(self, asked: &Mapping, constraints: &Constraints) -> Option<(Mapping, Constraints)> {
        let mut constraints = constraints.clone();
        let Constraints { tp, cp, pp, ep, etp, .. } = &mut constraints;
        for (place, (allowed, size)) in [tp, cp, pp, ep, etp].into_iter().zip(sizes(asked)).enumerate() {
            if !self.has(place) {
                if !allowed.contains(&size) {
                    return None;
                }
                *allowed = size..=size;
            }
        }
        let mut template = asked.clone();
        if self.has(Self::ORDER) {
            template.order = Order::default();
        }
        Some((template, constraints))
    }

    fn all_changed(self, asked: &Mapping, legal: &Mapping) -> bool {
        let sizes = sizes(asked).into_iter().zip(sizes(legal)).enumerate();
        let order_changed = !self.has(Self::ORDER) || asked.order != legal.order;
        order_changed && sizes.filter(|(place, _)| self.has(*place)).all(|(_, (a, b))| a != b)
    }
}

/// [`nearest`] mappings as the end of an error message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// The illegal mapping.
    pub asked: Mapping,
    /// The legal ones.
    pub legal: Vec<Mapping>,
}

impl Nearest {
    pub(crate) fn new(asked: Mapping, constraints: &Constraints) -> Self {
        let legal = nearest(&asked, constraints);
        Self { asked, legal }
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, legal } = self;
        write!(f, "\nasked for: {asked}")?;
        if legal.is_empty() {
            return write!(f, "\nno mapping of world_size {} is legal here", asked.world_size);
        }
        write!(f, "\nnearest legal mappings of world_size {}:", asked.world_size)?;
        for mapping in legal {
            write!(f, "\n  {mapping}  (")?;
            let mut separator = "";
            let names = ["tp", "cp", "pp", "ep", "etp"];
            for ((name, from), to) in names.into_iter().zip(sizes(asked)).zip(sizes(mapping)) {
                if from != to {
                    write!(f, "{separator}{name} {from} -> {to}")?;
                    separator = ", ";
                }
            }
            if asked.order != mapping.order {
                write!(f, "{separator}order {} -> {}", asked.order, mapping.order)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}
