//! Laws of groups, over random orders, sizes and splits, against the definition.

mod support;

use std::collections::HashSet;

use moe_topology::{Attention, Axes, Expert, Folding, GroupKey, Ranks, View};
use proptest::prelude::*;
use support::{ATTENTION, EXPERT, Sample, axes, digits_of, group_of, sample};

/// Everything that holds for the groups over one set of axes.
fn check_groups<V: View>(folding: &Folding, digits: [Axes<V>; 8], sizes: [usize; 8], mask: u8) {
    let axes = axes(digits, mask);
    let size: usize = (0..8).filter(|digit| mask >> digit & 1 == 1).map(|digit| sizes[digit]).product();
    assert_eq!(folding.size(axes), size);

    let groups: Vec<_> = folding.groups(axes).collect();
    assert_eq!(folding.groups(axes).len(), groups.len());
    assert!(groups.windows(2).all(|pair| pair[0].get(0) < pair[1].get(0)));
    let all: HashSet<usize> = groups.iter().flat_map(|group| group.iter()).collect();
    assert_eq!((groups.len() * size, all.len()), (folding.world_size(), folding.world_size()), "a partition");

    for rank in 0..folding.world_size() {
        let group = folding.group(rank, axes);
        let expected = group_of::<V>(folding, sizes, rank, mask);
        assert!(groups.contains(&group));
        assert_eq!(group.iter().collect::<Vec<_>>(), expected);
        assert_eq!((group.len(), group.iter().len()), (size, size));
        assert_eq!((group.axes(), group.key()), (axes, GroupKey::from(axes)));
        assert_eq!(folding.ranks(rank, group.key()), group.ranks());
        assert!(group.iter().rev().eq(expected.iter().rev().copied()));
        assert_eq!(group.iter().nth(size / 2), expected.get(size / 2).copied());
        assert_eq!((group.ranks().first(), group.ranks().last()), (expected[0], expected[size - 1]));
        for other in 0..folding.world_size() + 3 {
            let position = expected.iter().position(|rank| *rank == other);
            assert_eq!(group.position(other), position);
            assert_eq!(group.contains(other), position.is_some());
        }
        for (index, &member) in expected.iter().enumerate() {
            assert_eq!(group.get(index), member);
        }
        assert_eq!(Some(folding.coordinate(rank, axes)), group.position(rank));
    }
}

fn check_coordinates<V: View>(folding: &Folding, sizes: [usize; 8]) {
    let axis_sizes: [usize; 4] = std::array::from_fn(|axis| sizes[2 * axis] * sizes[2 * axis + 1]);
    let mut seen = HashSet::new();
    for rank in 0..folding.world_size() {
        let coordinates = folding.coordinates::<V>(rank);
        let digits = digits_of(rank, folding.mapping().order, V::AXES, sizes);
        for axis in 0..4 {
            assert_eq!(coordinates[axis], digits[2 * axis] + sizes[2 * axis] * digits[2 * axis + 1]);
        }
        assert_eq!(folding.rank_at::<V>(coordinates), Some(rank));
        assert!(seen.insert(coordinates));
    }
    for axis in 0..4 {
        let mut beyond = [0; 4];
        beyond[axis] = axis_sizes[axis];
        assert_eq!(folding.rank_at::<V>(beyond), None);
    }
}

fn check_pairs<V: View>(folding: &Folding, a: Axes<V>, b: Axes<V>, rank: usize) {
    let (in_a, in_b) = (folding.group(rank, a), folding.group(rank, b));
    let both: Vec<usize> = in_a.iter().filter(|rank| in_b.contains(*rank)).collect();
    assert!(
        folding.group(rank, a.intersect(b)).iter().eq(both.iter().copied()),
        "A ∩ B is the group of a ∩ b"
    );
    if a.is_disjoint(b) {
        assert_eq!(both, [rank], "orthogonal groups meet in one rank");
    }

    let parts: Vec<_> = folding.groups_within(in_a, b).collect();
    let mut members: Vec<usize> = parts.iter().flat_map(|part| part.iter()).collect();
    members.sort_unstable();
    assert!(in_a.iter().eq(members), "parts make up the whole");
    for part in parts {
        assert_eq!(part, folding.group(part.get(part.len() - 1), a.intersect(b)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn groups_are_what_they_are_defined_to_be(
        Sample { folding, attention, expert } in sample(),
        mask: u8,
    ) {
        check_groups(&folding, ATTENTION, attention, mask);
        check_groups(&folding, EXPERT, expert, mask);
    }

    #[test]
    fn coordinates_and_ranks_are_one_to_one(Sample { folding, attention, expert } in sample()) {
        check_coordinates::<Attention>(&folding, attention);
        check_coordinates::<Expert>(&folding, expert);
    }

    #[test]
    fn groups_intersect_and_nest_as_their_axes_do(
        Sample { folding, .. } in sample(),
        a: u8,
        b: u8,
        rank: prop::sample::Index,
    ) {
        let rank = rank.index(folding.world_size());
        check_pairs(&folding, axes(ATTENTION, a), axes(ATTENTION, b), rank);
        check_pairs(&folding, axes(EXPERT, a), axes(EXPERT, b), rank);
    }

    #[test]
    fn both_views_have_the_same_pipelines(Sample { folding, .. } in sample()) {
        let attention = folding.groups(Attention::PP).map(|group| group.ranks());
        prop_assert!(attention.eq(folding.groups(Expert::PP).map(|group| group.ranks())));
        for rank in 0..folding.world_size() {
            prop_assert_eq!(folding.stage(rank), folding.coordinate(rank, Expert::PP));
            prop_assert_eq!(folding.group(rank, Attention::PP).position(rank), Some(folding.stage(rank)));
        }
    }

    #[test]
    fn equal_sets_of_ranks_are_equal_values(Sample { folding, .. } in sample(), a: u8, b: u8) {
        for rank in 0..folding.world_size() {
            let dense: Ranks = folding.group(rank, axes(ATTENTION, a)).ranks();
            for expert in [a, b].map(|mask| folding.group(rank, axes(EXPERT, mask)).ranks()) {
                prop_assert_eq!(dense == expert, dense.iter().eq(expert.iter()));
            }
        }
    }
}

/// The reference's formula, for its default order.
#[test]
fn ranks_count_up_in_the_default_order() {
    use moe_topology::Mapping;
    let mapping = Mapping { world_size: 72, tp: 3, cp: 2, pp: 2, ep: 4, etp: 3, ..Mapping::default() };
    let folding = Folding::new(mapping).unwrap();
    for rank in 0..72 {
        let [tp, cp, dp, pp] = folding.coordinates::<Attention>(rank);
        assert_eq!(rank, tp + 3 * (cp + 2 * (dp + 6 * pp)));
        let [etp, ep, edp, pp] = folding.coordinates::<Expert>(rank);
        assert_eq!(rank, etp + 3 * (ep + 4 * (edp + 3 * pp)));
    }
}
