//! The legal mappings nearest to an illegal one.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Add;

use crate::enumerate::{divisors, pairs};
use crate::folding::layout;
use crate::group::Digit;
use crate::{Attention, Constraints, Expert, Mapping, Order};

/// How many mappings are proposed.
const AT_MOST: usize = 5;

/// The legal mappings of the same world nearest to what was asked: those that change the fewest numbers (the order, and
/// a split that is left out, count as one each), and among them those that change the numbers the least in sum. At most
/// five, the nearest first; the same input gives the same answer.
///
/// If `asked` is legal it is the only answer.
///
/// ```
/// use moe_topology::{Constraints, Mapping, nearest};
///
/// // Megatron's default, ETP = TP, needs 64 ranks for TP8·EP8.
/// let asked = Mapping { world_size: 8, tp: 8, ep: 8, etp: 8, ..Mapping::default() };
/// let legal = nearest(&asked, &Constraints::default());
/// assert_eq!(legal, [Mapping { etp: 1, ..asked.clone() }, Mapping { ep: 1, ..asked.clone() }]);
/// ```
#[must_use]
pub fn nearest(asked: &Mapping, constraints: &Constraints) -> Vec<Mapping> {
    let templates = templates(asked);
    let mut found: Vec<Candidate> = Vec::new();
    for (template, (changes, mapping)) in templates.iter().enumerate() {
        if found.first().is_some_and(|best| best.cost.changes < *changes) {
            break;
        }
        for pp in divisors(asked.world_size) {
            let [attention, expert] = nearest_pairs(asked, mapping, constraints, pp);
            let cost = Cost { changes: *changes, distance: 0 } + Cost::of([(asked.pp, pp)]);
            for (shared, attention) in attention {
                for &(other_cost, expert) in expert.get(&shared).into_iter().flatten() {
                    let candidate = |&(one_cost, attention): &(Cost, _)| {
                        let cost = cost + one_cost + other_cost;
                        Candidate { cost, template, pp, attention, expert }
                    };
                    found.extend(attention.iter().map(candidate));
                }
            }
            found.sort_unstable();
            found.truncate(AT_MOST);
        }
    }
    let fewest = found.first().map_or(0, |best| best.cost.changes);
    found.retain(|candidate| candidate.cost.changes == fewest);
    let mapping = |Candidate { template, pp, attention: (tp, cp), expert: (etp, ep), .. }: Candidate| {
        Mapping { pp, tp, cp, etp, ep, ..templates[template].1.clone() }
    };
    found.into_iter().map(mapping).collect()
}

/// Sizes that make a template a legal mapping. What costs the same is ordered by the other fields.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    cost: Cost,
    template: usize,
    pp: usize,
    attention: (usize, usize),
    expert: (usize, usize),
}

/// How far a mapping is from what was asked. It adds up over the numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    changes: usize,
    distance: usize,
}

impl Cost {
    /// Of numbers as they were asked and as they are legal.
    fn of<const N: usize>(numbers: [(usize, usize); N]) -> Self {
        numbers.into_iter().fold(Self::default(), |cost, (asked, legal)| {
            cost + Self { changes: usize::from(asked != legal), distance: asked.abs_diff(legal) }
        })
    }
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        let distance = self.distance.saturating_add(other.distance);
        Self { changes: self.changes + other.changes, distance }
    }
}

/// What was asked, also in the default order and without some of its splits, and how many changes that makes: the
/// fewest first.
fn templates(asked: &Mapping) -> Vec<(usize, Mapping)> {
    let mut templates = vec![(0, asked.clone())];
    if asked.order != Order::default() {
        templates.push((1, Mapping { order: Order::default(), ..asked.clone() }));
    }
    for (digit, _) in asked.splits.iter() {
        let mut without = templates.clone();
        for (changes, template) in &mut without {
            *changes += 1;
            template.splits.remove(digit);
        }
        templates.extend(without);
    }
    templates.sort_by_key(|(changes, _)| *changes);
    templates
}

/// Pairs `(tp, cp)` or `(etp, ep)` that are legal in their view, by what both views must share.
type Pairs = BTreeMap<[Digit; 2], Vec<(Cost, (usize, usize))>>;

/// The pairs of both views that fit a template with this `pp`.
///
/// Pairs that share the same go together whatever their sizes. So the nearest mappings are made of the nearest pairs of
/// each view, and of those that share the same no more are kept than are proposed.
fn nearest_pairs(asked: &Mapping, template: &Mapping, constraints: &Constraints, pp: usize) -> [Pairs; 2] {
    let (mut attention, mut expert) = (Pairs::new(), Pairs::new());
    if constraints.check_pipeline(pp).is_ok() {
        let stage = asked.world_size / pp;
        let dp = |tp, cp| stage / (tp * cp);
        for (tp, cp) in pairs(stage, |tp, cp| constraints.check_attention(tp, cp, dp(tp, cp)).is_ok()) {
            if let Ok(layout) = layout::<Attention>(template, [tp, cp, dp(tp, cp), pp]) {
                let cost = Cost::of([(asked.tp, tp), (asked.cp, cp)]);
                attention.entry(layout.shared()).or_default().push((cost, (tp, cp)));
            }
        }
        for (etp, ep) in pairs(stage, |etp, ep| constraints.check_expert(etp, ep).is_ok()) {
            if let Ok(layout) = layout::<Expert>(template, [etp, ep, stage / (etp * ep), pp]) {
                let cost = Cost::of([(asked.etp, etp), (asked.ep, ep)]);
                expert.entry(layout.shared()).or_default().push((cost, (etp, ep)));
            }
        }
    }
    for pairs in attention.values_mut().chain(expert.values_mut()) {
        pairs.sort_unstable();
        pairs.truncate(AT_MOST);
    }
    [attention, expert]
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
            write!(f, "\n  {mapping}  ({})", changes(asked, mapping).join(", "))?;
        }
        Ok(())
    }
}

fn changes(asked: &Mapping, legal: &Mapping) -> Vec<String> {
    let sizes = [
        ("tp", asked.tp, legal.tp),
        ("cp", asked.cp, legal.cp),
        ("pp", asked.pp, legal.pp),
        ("ep", asked.ep, legal.ep),
        ("etp", asked.etp, legal.etp),
    ];
    let changed = sizes.into_iter().filter(|(_, from, to)| from != to);
    let mut changes: Vec<String> = changed.map(|(name, from, to)| format!("{name} {from} -> {to}")).collect();
    if asked.order != legal.order {
        changes.push(format!("order {} -> {}", asked.order, legal.order));
    }
    let left_out = asked.splits.iter().filter(|split| legal.splits.iter().all(|kept| kept != *split));
    changes.extend(left_out.map(|(digit, size)| format!("without {digit} {size}")));
    changes
}
