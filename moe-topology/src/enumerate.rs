//! All legal foldings of a world.

use crate::{Constraints, Folding, Mapping, Order};

/// All legal foldings of `world_size` ranks in this order of axes, none of them split.
///
/// They ascend by `(pp, tp, cp, etp, ep)`. Nothing is kept in memory but the sizes that one stage can have, so
/// `.count()` of a large world is cheap.
///
/// ```
/// use moe_topology::{Constraints, Order, enumerate};
///
/// let eight_experts = Constraints { num_experts: Some(8), etp: 1..=1, cp: 1..=1, ..Constraints::default() };
/// let all = enumerate(6, Order::default(), &eight_experts);
/// let sizes: Vec<_> = all.map(|f| (f.mapping().pp, f.mapping().tp, f.mapping().ep)).collect();
/// assert_eq!(sizes, [
///     (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (1, 3, 1), (1, 3, 2), (1, 6, 1), (1, 6, 2),
///     (2, 1, 1), (2, 3, 1), (3, 1, 1), (3, 1, 2), (3, 2, 1), (3, 2, 2), (6, 1, 1),
/// ]);
/// ```
pub fn enumerate(
    world_size: usize,
    order: Order,
    constraints: &Constraints,
) -> impl Iterator<Item = Folding> + use<> {
    let constraints = constraints.clone();
    let mut pipelines = divisors(world_size);
    pipelines.retain(|&pp| constraints.check_pipeline(pp).is_ok());
    pipelines.into_iter().flat_map(move |pp| {
        let stage = world_size / pp;
        let attention = pairs(stage, |tp, cp| constraints.check_attention(tp, cp, stage / (tp * cp)).is_ok());
        let expert = pairs(stage, |etp, ep| constraints.check_expert(etp, ep).is_ok());
        let template = Mapping { world_size, pp, order, ..Mapping::default() };
        attention.into_iter().flat_map(move |(tp, cp)| {
            let template = Mapping { tp, cp, ..template.clone() };
            let fold = move |(etp, ep)| Folding::build(Mapping { etp, ep, ..template.clone() }).ok();
            expert.clone().into_iter().filter_map(fold)
        })
    })
}

/// Pairs `(a, b)` that are allowed and whose product divides `n`, ascending.
pub(crate) fn pairs(n: usize, allowed: impl Fn(usize, usize) -> bool) -> Vec<(usize, usize)> {
    let divisors = divisors(n);
    let fits = |&(a, b): &(usize, usize)| n.is_multiple_of(a) && (n / a).is_multiple_of(b) && allowed(a, b);
    divisors.iter().flat_map(|&a| divisors.iter().map(move |&b| (a, b))).filter(fits).collect()
}

/// The divisors of `n`, ascending; none of 0, nor of a world of 2^32 ranks or more, which is illegal.
pub(crate) fn divisors(n: usize) -> Vec<usize> {
    if u32::try_from(n).is_err() {
        return Vec::new();
    }
    let small: Vec<usize> = (1..).take_while(|d| d * d <= n).filter(|d| n.is_multiple_of(*d)).collect();
    let large = small.iter().rev().map(|d| n / d).filter(|d| d * d > n);
    small.iter().copied().chain(large).collect()
}
