//! What becomes of choices of experts: dropped or kept, and sorted.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::Cpu;
use super::float::CpuFloat;
use super::matrix::{Mat, MatMut};
use crate::check;
use crate::family::{DropLimit, SortOutput};
use crate::{Error, Result, View, ViewMut};

/// [`Routing::drop_excess`](crate::family::Routing::drop_excess).
pub(super) fn drop_excess<T: CpuFloat>(
    mut kept: ViewMut<'_, i32, Cpu>,
    experts: View<'_, i32, Cpu>,
    weights: Option<View<'_, T, Cpu>>,
    slots: View<'_, i32, Cpu>,
    limit: DropLimit,
) -> Result<()> {
    const KERNEL: &str = "drop_excess";
    check::drop_excess(KERNEL, &kept, experts, weights, slots, limit)?;
    let (experts, slots) = (Mat::from(experts), Mat::from(slots).vector());
    check::indices(KERNEL, "expert", experts.iter().flatten(), limit.num_experts)?;
    check::argument(KERNEL, slots.iter().all(|&slot| slot >= 0), || "a slot is negative".to_owned())?;
    let weights = weights.map(Mat::from);
    if let Some(weights) = weights
        && let Some(row) = weights.iter().position(|row| row.iter().any(|w| w.partial_cmp(w).is_none()))
    {
        return Err(Error::NotANumber { kernel: KERNEL, row });
    }
    let mut kept = MatMut::from(&mut kept);
    for (i, experts) in experts.iter().enumerate() {
        for (kept, &e) in kept.row(i).iter_mut().zip(experts) {
            *kept = e.max(-1);
        }
    }
    for (i, j) in excess(experts, weights, slots, limit) {
        kept.row(i)[j] = -1;
    }
    Ok(())
}

/// The choices `(i, j)` that lose their place to others of the same expert and unit.
fn excess<T: CpuFloat>(
    experts: Mat<'_, i32>,
    weights: Option<Mat<'_, T>>,
    slots: &[i32],
    limit: DropLimit,
) -> impl Iterator<Item = (usize, usize)> {
    // Units by their numbers: the memory that this takes does not grow with the slots.
    let mut rivals = BTreeMap::<_, Vec<_>>::new();
    for (i, experts) in experts.iter().enumerate() {
        let unit = slots[i] as usize / limit.unit_slots;
        for (j, &e) in experts.iter().enumerate().filter(|&(_, &e)| e >= 0) {
            rivals.entry((unit, e)).or_default().push((i, j));
        }
    }
    let goes_before = move |&(a, j): &(usize, usize), &(b, l): &(usize, usize)| {
        let by_weight = weights.and_then(|weights| weights.row(b)[l].partial_cmp(&weights.row(a)[j]));
        by_weight.unwrap_or(Ordering::Equal).then(slots[a].cmp(&slots[b]))
    };
    rivals.into_values().filter(move |rivals| rivals.len() > limit.capacity).flat_map(move |mut rivals| {
        rivals.select_nth_unstable_by(limit.capacity, goes_before);
        rivals.split_off(limit.capacity)
    })
}

/// [`Routing::sort_by_expert`](crate::family::Routing::sort_by_expert).
pub(super) fn sort_by_expert(
    out: SortOutput<'_, Cpu>,
    experts: View<'_, i32, Cpu>,
    rows_per_expert: Option<usize>,
) -> Result<()> {
    const KERNEL: &str = "sort_by_expert";
    let count = check::sort_by_expert(KERNEL, &out, experts, rows_per_expert)?;
    let SortOutput { mut order, mut tokens, mut position, mut offsets } = out;
    let [_, k] = experts.shape();
    let experts = Mat::from(experts);
    check::indices(KERNEL, "expert", experts.iter().flatten(), count)?;
    let (order, tokens) = (MatMut::from(&mut order).vector(), MatMut::from(&mut tokens).vector());
    let (mut position, offsets) = (MatMut::from(&mut position), MatMut::from(&mut offsets).vector());

    // Counts, then first rows.
    let mut next = vec![0; count + 1];
    for &e in experts.iter().flatten().filter(|&&e| e >= 0) {
        next[e as usize + 1] += 1;
    }
    if let Some(rows) = rows_per_expert {
        let most = next.iter().max().map_or(0, |&count| count as usize);
        check::argument(KERNEL, most <= rows, || {
            format!("an expert has {most} choices and room for {rows}")
        })?;
        next[1..].fill(rows as i32);
    }
    for e in 1..=count {
        next[e] += next[e - 1];
    }
    offsets.copy_from_slice(&next);

    order.fill(-1);
    tokens.fill(-1);
    for (i, experts) in experts.iter().enumerate() {
        for (j, (position, &e)) in position.row(i).iter_mut().zip(experts).enumerate() {
            *position = -1;
            if e >= 0 {
                let row = &mut next[e as usize];
                *position = *row;
                order[*row as usize] = (i * k + j) as i32;
                tokens[*row as usize] = i as i32;
                *row += 1;
            }
        }
    }
    Ok(())
}
