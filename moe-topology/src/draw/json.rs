//! All groups of a folding for other programs.

use super::digits;
use crate::{Attention, Axes, Expert, Folding, Group, View};

/// The groups of both views as JSON, lists and ranks in Megatron's order:
/// `{"world_size":…,"order":"…","attention":{"tp":[[…],…],…},"moe":{"etp":[[…],…],…}}`.
///
/// The names are those of [`View::GROUPS`]; an axis of two digits has them too, as `cp.inner` and `cp.outer`.
///
/// ```
/// use moe_topology::{Folding, Mapping, draw};
///
/// let folding = Folding::new(Mapping { world_size: 2, tp: 2, ep: 2, ..Mapping::default() })?;
/// let json = draw::json(&folding);
/// assert!(json.starts_with(r#"{"world_size":2,"order":"tp-cp-ep-dp-pp","attention":{"tp":[[0,1]],"cp":[[0],[1]],"#));
/// # Ok::<(), moe_topology::Error>(())
/// ```
#[must_use]
pub fn json(folding: &Folding) -> String {
    let (world_size, order) = (folding.world_size(), folding.mapping().order);
    let (attention, moe) = (view::<Attention>(folding), view::<Expert>(folding));
    format!(r#"{{"world_size":{world_size},"order":"{order}","attention":{attention},"moe":{moe}}}"#)
}

fn view<V: View>(folding: &Folding) -> String {
    let group = |group: Group<V>| format!("[{}]", commas(group.iter()));
    let groups = |axes| format!("[{}]", commas(folding.groups(axes).map(group)));
    let named = V::GROUPS.iter().map(|&(name, axes)| (name.to_owned(), axes));
    let split = (0..4).map(digits::<V>).filter(|digits| digits.iter().all(|&digit| folding.size(digit) > 1));
    let split = split.flatten().map(|digit: Axes<V>| (digit.to_string(), digit));
    format!("{{{}}}", commas(named.chain(split).map(|(name, axes)| format!(r#""{name}":{}"#, groups(axes)))))
}

fn commas<T: ToString>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}
