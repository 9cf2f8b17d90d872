//! What becomes of choices of experts: dropped or kept, and sorted.

use super::host::{
    Matrix, Placed, Random, assert_data_refused, assert_refused, output_ints, place, place_ints, settled,
};
use crate::family::{DropLimit, Routing, SortOutput};
use crate::{Error, Float, Result};

/// What an expert keeps by the definition: token by token in slot order, those that fewer than `capacity` go before.
fn kept(
    experts: &[i32],
    k: usize,
    weights: Option<&Matrix>,
    slots: &[i32],
    DropLimit { unit_slots, capacity, .. }: DropLimit,
) -> Vec<i32> {
    let weight = |c: usize| weights.map_or(0.0, |weights| weights.data[c]);
    let unit = |c: usize| slots[c / k] as usize / unit_slots;
    let survives = |c: usize| {
        let goes_before =
            |o: usize| weight(o) > weight(c) || (weight(o) == weight(c) && slots[o / k] < slots[c / k]);
        let rivals = (0..experts.len()).filter(|&o| experts[o] == experts[c] && unit(o) == unit(c));
        experts[c] >= 0 && rivals.filter(|&o| goes_before(o)).count() < capacity
    };
    (0..experts.len()).map(|c| if survives(c) { experts[c] } else { -1 }).collect()
}

pub(super) fn dropping<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let mut random = Random::new(17);
    // Tokens, choices, experts, units, capacity.
    for (n, k, num_experts, units, capacity) in [
        (0, 2, 4, 1, 1),
        (1, 1, 1, 1, 1),
        (12, 2, 4, 1, 3),
        (12, 2, 4, 3, 2),
        (9, 3, 3, 1, 4),
        (30, 2, 7, 2, 1),
        (30, 2, 7, 2, 15),
        (30, 2, 7, 2, 0),
        (400, 3, 11, 1, 60),
    ] {
        let unit_slots = (n / units).max(1);
        let limit = DropLimit { num_experts, unit_slots, capacity };
        // Tokens stand anywhere.
        let mut slots: Vec<i32> = (0..n as i32).collect();
        for i in (1..n).rev() {
            slots.swap(i, random.below(i + 1));
        }
        for skew in ["spread", "some nowhere", "one"] {
            let mut experts = Vec::new();
            for i in 0..n {
                let first = if skew == "one" { 0 } else { random.below(num_experts) };
                experts.extend((0..k).map(|j| ((first + j) % num_experts) as i32));
                if skew == "some nowhere" && i % 3 == 1 {
                    experts[i * k] = -1 - (i as i32 % 2);
                }
            }
            // Few values, so that many tie.
            let weights = Matrix::from_fn(n, k, |i, j| ((7 * i + 3 * j) % 5) as f64 / 8.0);
            for weights in [None, Some(&weights)] {
                let what =
                    format!("{n} tokens, {k} of {num_experts}, {limit:?}, {skew}, {}", weights.is_some());
                let (pe, ps) = (place_ints(device, n, k, &experts), place_ints(device, 1, n, &slots));
                let pw = weights.map(|weights| place::<A, D>(device, weights));
                let mut out = output_ints(device, n, k);
                let weighed = pw.as_ref().map(Placed::view);
                device
                    .drop_excess(out.view_mut(), pe.view(), weighed, ps.view(), limit)
                    .expect("drop_excess");
                assert_eq!(out.elements(), kept(&experts, k, weights, &slots, limit), "kept, {what}");
            }
        }
    }
    drop_refusals::<A, D>(device);
}

fn drop_refusals<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let limit = DropLimit { num_experts: 3, unit_slots: 4, capacity: 1 };
    let drop = |experts: [i32; 4], weights: Option<Matrix>, slots: &[i32], limit| {
        let (experts, slots) =
            (place_ints(device, 4, 1, &experts), place_ints(device, 1, slots.len(), slots));
        let weights = weights.map(|weights| place::<A, D>(device, &weights));
        let mut out = output_ints(device, 4, 1);
        let weights = weights.as_ref().map(Placed::view);
        device.drop_excess(out.view_mut(), experts.view(), weights, slots.view(), limit)
    };
    let slots = [0, 1, 2, 3];
    assert_data_refused(device, "no such expert", drop([0, 1, 3, 0], None, &slots, limit));
    assert_data_refused(device, "a negative slot", drop([0, 1, 2, 0], None, &[0, 1, -2, 3], limit));
    assert_refused("slots of other tokens", drop([0, 1, 2, 0], None, &slots[..3], limit));
    let empty = DropLimit { unit_slots: 0, ..limit };
    assert_refused("units without slots", drop([0, 1, 2, 0], None, &slots, empty));
    let wide = Matrix::from_fn(4, 2, |_, _| 1.0);
    assert_refused("weights of more choices", drop([0, 1, 2, 0], Some(wide), &slots, limit));
    let nan = Matrix::from_fn(4, 1, |i, _| if i > 1 { f64::NAN } else { 1.0 });
    let named = settled(device, drop([0, 0, 0, 0], Some(nan), &slots, limit));
    assert!(matches!(named, Err(Error::NotANumber { row: 2, .. })), "a weight that is no number: {named:?}");
}

/// The stable sort, packed and with room for each expert.
pub(super) fn sorting<A: Float<Acc = A>, D: Routing<A>>(device: &D) {
    let mut random = Random::new(15);
    for (n, k, count) in [(0, 2, 3), (7, 2, 4), (5, 1, 1), (300, 3, 11), (6, 2, 0)] {
        for skew in ["spread", "one", "dropped"] {
            let mut experts = random.ints(n * k, count.max(1));
            match skew {
                "one" => experts.fill(count as i32 - 1),
                "dropped" => experts.iter_mut().step_by(3).for_each(|e| *e = -1),
                _ => {}
            }
            if count == 0 {
                experts.fill(-1);
            }
            let of = |e: usize| (0..n * k).filter(|&j| experts[j] == e as i32).collect::<Vec<_>>();
            let groups: Vec<Vec<usize>> = (0..count).map(of).collect();
            let most = groups.iter().map(Vec::len).max().unwrap_or(0);
            for room in [None, Some(most), Some(most + 2)] {
                sorted::<A, D>(device, &experts, [n, k], &groups, room, skew);
            }
            if most > 0 {
                let (result, _) = sort::<A, D>(device, &experts, [n, k], count, Some(most - 1));
                assert_data_refused(device, "no room for the choices of an expert", result);
            }
            if n > 0 {
                let outside = vec![count as i32; n * k];
                let (result, _) = sort::<A, D>(device, &outside, [n, k], count, None);
                assert_data_refused(device, "no such expert", result);
            }
        }
    }
    let pe = place_ints(device, 1, 1, &[0]);
    let ints = |cols| output_ints(device, 1, cols);
    let (mut o, mut t, mut p, mut none) = (ints(1), ints(1), ints(1), ints(0));
    let out = SortOutput {
        order: o.view_mut(),
        tokens: t.view_mut(),
        position: p.view_mut(),
        offsets: none.view_mut(),
    };
    assert_refused("offsets", device.sort_by_expert(out, pe.view(), None));
}

/// Order, tokens, position, offsets.
type Sorted<D> = [Placed<i32, D>; 4];

fn sort<A: Float<Acc = A>, D: Routing<A>>(
    device: &D,
    experts: &[i32],
    [n, k]: [usize; 2],
    count: usize,
    room: Option<usize>,
) -> (Result<()>, Sorted<D>) {
    let rows = room.map_or(n * k, |room| room * count);
    let shapes = [[1, rows], [1, rows], [n, k], [1, count + 1]];
    let mut placed = shapes.map(|[rows, cols]| output_ints(device, rows, cols));
    let [order, tokens, position, offsets] = placed.each_mut().map(Placed::view_mut);
    let out = SortOutput { order, tokens, position, offsets };
    (device.sort_by_expert(out, place_ints(device, n, k, experts).view(), room), placed)
}

/// `groups`: the choices of each expert.
fn sorted<A: Float<Acc = A>, D: Routing<A>>(
    device: &D,
    experts: &[i32],
    [n, k]: [usize; 2],
    groups: &[Vec<usize>],
    room: Option<usize>,
    skew: &str,
) {
    let (mut want, mut offsets) = (Vec::new(), vec![0]);
    for group in groups {
        want.extend(group.iter().map(|&j| j as i32));
        if let Some(room) = room {
            want.resize(want.len() + room - group.len(), -1);
        }
        offsets.push(want.len() as i32);
    }
    if room.is_none() {
        want.resize(n * k, -1);
    }
    let row = |j: usize| want.iter().position(|&w| w == j as i32).map_or(-1, |row| row as i32);
    let position: Vec<i32> = (0..n * k).map(row).collect();
    let tokens: Vec<i32> = want.iter().map(|&j| if j < 0 { -1 } else { j / k as i32 }).collect();

    let (result, got) = sort::<A, D>(device, experts, [n, k], groups.len(), room);
    result.expect("sort_by_expert");
    let [order, got_tokens, got_position, got_offsets] = got.each_ref().map(Placed::elements);
    assert_eq!(order, want, "order, {skew}, {room:?}");
    assert_eq!(got_tokens, tokens, "tokens, {skew}, {room:?}");
    assert_eq!(got_position, position, "position, {skew}, {room:?}");
    assert_eq!(got_offsets, offsets, "offsets, {skew}, {room:?}");
}
