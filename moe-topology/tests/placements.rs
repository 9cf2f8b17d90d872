//! Laws of placements: every element is stored, updated and counted where it should be, exactly once.

mod support;

use std::ops::Range;

use moe_topology::{Attention, Axes, Error, Expert, Folding, Mapping, Owner, Placement, View};
use proptest::prelude::*;
use support::{ATTENTION, EXPERT, Sample, axes, sample};

/// What a digit is used for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    Shard(usize),
    Partial,
    Replicated,
}

#[derive(Clone, Debug)]
struct Case {
    dims: Vec<usize>,
    /// Of the six digits that are not `pp`.
    uses: [Use; 6],
    tied: bool,
    stages: [usize; 2],
}

fn case() -> impl Strategy<Value = Case> {
    let dims = prop::collection::vec(1usize..=7, 0..=4);
    (dims, any::<[u8; 6]>(), any::<bool>(), any::<[usize; 2]>()).prop_map(|(dims, uses, tied, stages)| {
        let uses = uses.map(|choice| match usize::from(choice) % 7 {
            dim @ 0..=3 if dim < dims.len() => Use::Shard(dim),
            0..=4 => Use::Partial,
            _ => Use::Replicated,
        });
        Case { dims, uses, tied, stages }
    })
}

fn place<V: View>(case: &Case, digits: [Axes<V>; 8], pp: usize) -> Placement<V> {
    let all = |what: Use| {
        let mask = (0..6).filter(|digit| case.uses[*digit] == what).fold(0, |mask, digit| mask | 1 << digit);
        axes(digits, mask)
    };
    let shards: Vec<_> = (0..case.dims.len()).map(|dim| (dim, all(Use::Shard(dim)))).collect();
    let [one, other] = case.stages.map(|stage| stage % pp);
    let owner = if case.tied { Owner::Tied(one, other) } else { Owner::Stage(one) };
    Placement::new(&case.dims, &shards, all(Use::Partial), owner).unwrap()
}

/// Row-major indices of all elements inside `slice`, by counting through the logical tensor.
fn elements(dims: &[usize], slice: &[Range<usize>]) -> Vec<usize> {
    let len: usize = dims.iter().product();
    let inside = |index: &usize| {
        let mut rest = *index;
        dims.iter().zip(slice).rev().all(|(dim, range)| {
            let coordinate = rest % dim;
            rest /= dim;
            range.contains(&coordinate)
        })
    };
    (0..len).filter(inside).collect()
}

fn check<V: View>(folding: &Folding, placement: &Placement<V>) {
    let len: usize = placement.dims().iter().product();
    let mut counted = vec![0; len];
    let mut held = vec![0; len];
    placement.check(folding).unwrap();
    for rank in 0..folding.world_size() {
        let slice = placement.slice(folding, rank);
        let mine = elements(placement.dims(), &slice);
        let local_len = placement.local_len(folding, rank);
        assert_eq!(mine.len(), local_len);
        assert!(
            placement.local_dims(folding, rank).iter().copied().eq(slice.iter().map(|range| range.len()))
        );
        for &(dim, axes) in placement.shards() {
            let (n, blocks) = (placement.dims()[dim], folding.size(axes));
            if n % blocks == 0 {
                assert_eq!(slice[dim].len(), n / blocks, "even where divisible");
            } else {
                let full = slice[dim].len() == n.div_ceil(blocks);
                assert!(full || slice[dim].end == n, "only the last blocks are short");
            }
        }

        let mut found = Vec::new();
        let mut runs = placement.runs(folding, rank, 0..local_len + 5).peekable();
        while let Some(run) = runs.next() {
            assert_eq!(run.local, found.len());
            found.extend(run.global..run.global + run.len);
            assert!(runs.peek().is_none_or(|next| next.global != run.global + run.len), "as long as can be");
        }
        assert_eq!(found, mine);

        assert_eq!(placement.cut_axes() | placement.instance_axes(), placement.partial());
        let group = folding.group(rank, placement.cut_axes());
        let cut = placement.zero_cut(local_len, folding, rank);
        assert_eq!(cut.len(), local_len.div_ceil(group.len()));
        assert_eq!(Some(cut.start), group.position(rank).map(|position| position * cut.len()));
        assert!(cut.len() * group.len() >= local_len, "the cuts cover the buffer");

        if placement.holds(folding, rank) {
            mine.iter().for_each(|&element| held[element] += 1);
        }
        if placement.counts(folding, rank) {
            assert!(placement.holds(folding, rank));
            for run in placement.runs(folding, rank, cut) {
                (run.global..run.global + run.len).for_each(|element| counted[element] += 1);
            }
        }
        let copies = match placement.owner() {
            Owner::Tied(one, other) if one != other => 2,
            _ => 1,
        };
        match placement.tied_ranks(folding, rank) {
            Some(ranks) => {
                assert!(copies == 2 && ranks.len() == 2 && ranks.contains(rank));
                for peer in ranks {
                    assert!(placement.holds(folding, peer));
                    assert_eq!(placement.slice(folding, peer), slice);
                    assert_eq!(folding.group(peer, Attention::PP), folding.group(rank, Attention::PP));
                }
            }
            None => assert!(copies == 1 || !placement.holds(folding, rank)),
        }
        let same = folding.size(placement.partial() | placement.replicated()) * copies;
        if rank + 1 == folding.world_size() {
            assert!(held.iter().all(|times| *times == same), "each element is on every copy");
        }
    }
    assert!(counted.iter().all(|times| *times == 1), "each element counts once: {placement:?} {counted:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_element_is_stored_updated_and_counted_once(Sample { folding, .. } in sample(), case in case()) {
        let pp = folding.size(Attention::PP);
        check(&folding, &place(&case, ATTENTION, pp));
        check(&folding, &place(&case, EXPERT, pp));
    }
}

#[test]
fn a_vocabulary_has_short_and_empty_last_blocks() {
    let folding = Folding::new(Mapping { world_size: 8, tp: 8, ..Mapping::default() }).unwrap();
    let embedding = Placement::new(&[10, 3], &[(0, Attention::TP)], Attention::DP, Owner::Stage(0)).unwrap();
    let blocks: Vec<_> = (0..8).map(|rank| embedding.slice(&folding, rank)[0].clone()).collect();
    assert_eq!(blocks, [0..2, 2..4, 4..6, 6..8, 8..10, 10..10, 10..10, 10..10]);
    let folding = Folding::new(Mapping { world_size: 4, tp: 4, ..Mapping::default() }).unwrap();
    let blocks: Vec<_> = (0..4).map(|rank| embedding.slice(&folding, rank)[0].clone()).collect();
    assert_eq!(blocks, [0..3, 3..6, 6..9, 9..10]);
}

#[test]
fn a_tensor_may_be_as_large_as_can_be_counted() {
    let folding = Folding::new(Mapping { world_size: 2, tp: 2, ..Mapping::default() }).unwrap();
    let of = |dims: &[usize]| Placement::new(dims, &[(0, Attention::TP)], Axes::NONE, Owner::Stage(0));
    let huge = of(&[usize::MAX]).unwrap();
    let half = 1 << (usize::BITS - 1);
    assert_eq!([0, 1].map(|rank| huge.slice(&folding, rank)[0].clone()), [0..half, half..usize::MAX]);
    let partial = Placement::new(&[usize::MAX], &[], Attention::TP, Owner::Stage(0)).unwrap();
    assert_eq!(partial.zero_cut(usize::MAX, &folding, 1), half..usize::MAX);
    for empty in [[usize::MAX, 2, 0], [0, usize::MAX, 2]] {
        assert_eq!(of(&empty), Err(Error::TooLarge { dims: empty.into() }));
    }
}

/// Two key-value heads shared by eight TP ranks: four neighbours hold the same head and sum its gradient.
#[test]
fn shared_key_value_heads_are_digits_of_tp() {
    let mapping = Mapping { world_size: 16, tp: 8, ..Mapping::default() }.split(Attention::TP_OUTER, 2);
    let folding = Folding::new(mapping).unwrap();
    let partial = Attention::TP_INNER | Attention::CP | Attention::DP;
    let k = Placement::new(&[6, 5], &[(0, Attention::TP_OUTER)], partial, Owner::Stage(0)).unwrap();
    let heads: Vec<_> = (0..8).map(|rank| k.slice(&folding, rank)[0].start / 3).collect();
    assert_eq!(heads, [0, 0, 0, 0, 1, 1, 1, 1]);
    assert!(k.partial_group(&folding, 5).iter().eq([4, 5, 6, 7, 12, 13, 14, 15]));
    assert!(k.replicated().is_empty() && (0..16).all(|rank| k.counts(&folding, rank)));
}

/// Two instances of the optimizer keep the same slices: those of the first count.
#[test]
fn an_optimizer_instance_cuts_alone() {
    let mapping = Mapping { world_size: 8, cp: 2, ..Mapping::default() }.optimizer_instances(2);
    let folding = Folding::new(mapping).unwrap();
    let q = Placement::new(&[8], &[], Attention::CP | Attention::DP, Owner::Stage(0)).unwrap();
    assert_eq!(q.cut_axes(), Attention::CP | Attention::DP_INNER);
    assert_eq!(q.instance_axes(), Attention::DP_OUTER);
    let cuts: Vec<_> = (0..8).map(|rank| q.zero_cut(8, &folding, rank).start).collect();
    assert_eq!(cuts, [0, 2, 4, 6, 0, 2, 4, 6]);
    assert!((0..8).all(|rank| q.counts(&folding, rank) == (rank < 4)));
}

#[test]
fn contradictions_are_refused() {
    let new = |dims: &[usize], shards: &[(usize, Axes<Expert>)], partial| {
        Placement::new(dims, shards, partial, Owner::Stage(0)).unwrap_err().to_string()
    };
    assert_eq!(
        new(&[4, 8], &[(2, Expert::EP)], Expert::EDP),
        "cannot shard dimension 2 of a tensor of shape [4, 8]"
    );
    assert_eq!(
        new(&[4, 8], &[(0, Expert::EP), (0, Expert::ETP)], Expert::EDP),
        "dimension 0 is sharded twice: give it all its axes at once, as in `TP | CP`"
    );
    let twice = "is used twice: an axis shards one dimension, or the gradient is partial over it, or neither";
    assert_eq!(
        new(&[4, 8], &[(0, Expert::EP), (1, Expert::EP_INNER | Expert::ETP)], Expert::EDP),
        format!("expert ep.inner {twice}")
    );
    assert_eq!(new(&[4, 8], &[(0, Expert::EP)], Expert::EP | Expert::EDP), format!("expert ep {twice}"));
    let over_stages = "a tensor belongs to a stage (its owner): it is neither sharded nor partial over pp";
    assert_eq!(new(&[4], &[(0, Expert::PP_OUTER)], Expert::EDP), over_stages);
    assert_eq!(new(&[4], &[], Expert::EDP | Expert::PP), over_stages);
    let text = new(&[usize::MAX, 2], &[], Expert::EDP);
    assert_eq!(text, format!("a tensor of shape [{}, 2] has more than usize::MAX elements", usize::MAX));

    let folding = Folding::new(Mapping { world_size: 2, pp: 2, ..Mapping::default() }).unwrap();
    let head = Placement::new(&[4], &[], Attention::DP, Owner::Tied(0, 2)).unwrap();
    assert_eq!(head.check(&folding), Err(Error::NoSuchStage { stage: 2, pp: 2 }));
    assert!((0..2).all(|rank| head.tied_ranks(&folding, rank).is_none()));
}
