//! What is legal, all that is legal, and what is nearest to it.

use std::collections::BTreeSet;

use moe_topology::{
    Attention, Axes, Constraints, Error, Expert, Folding, Mapping, Order, Rule, enumerate, nearest,
};
use proptest::prelude::*;

fn sizes(mapping: &Mapping) -> [usize; 5] {
    let &Mapping { tp, cp, pp, ep, etp, .. } = mapping;
    [tp, cp, pp, ep, etp]
}

/// All mappings of a world that the two divisions and, if `pp` is not last, `tp·cp = etp·ep` allow.
fn by_definition(world_size: usize, order: Order) -> Vec<Mapping> {
    let mut all = Vec::new();
    let divides = |product| world_size.is_multiple_of(product);
    for pp in 1..=world_size {
        for tp in 1..=world_size {
            for cp in (1..=world_size).filter(|cp| divides(tp * cp * pp)) {
                for etp in 1..=world_size {
                    for ep in (1..=world_size).filter(|ep| divides(etp * ep * pp)) {
                        if order == Order::PP_LAST || pp == 1 || tp * cp == etp * ep {
                            all.push(Mapping {
                                world_size,
                                tp,
                                cp,
                                pp,
                                ep,
                                etp,
                                order,
                                ..Mapping::default()
                            });
                        }
                    }
                }
            }
        }
    }
    all
}

#[test]
fn enumeration_finds_all_that_is_legal_in_order() {
    for world_size in (1..=16).chain([24, 36]) {
        for order in [Order::PP_LAST, Order::DP_LAST] {
            let found: Vec<Mapping> =
                enumerate(world_size, order, &Constraints::default()).map(|f| f.mapping().clone()).collect();
            assert_eq!(found, by_definition(world_size, order), "{world_size} {order}");
        }
    }
}

#[test]
fn large_worlds_are_enumerated() {
    // A stage of 2^m ranks has C(m+2, 2) ways to choose two of three sizes, in each view.
    let ways = |m: usize| (m + 2) * (m + 1) / 2;
    let expected: usize = (0..=10).map(|m| ways(m) * ways(m)).sum();
    assert_eq!(enumerate(1024, Order::default(), &Constraints::default()).count(), expected);
    assert_eq!(enumerate(0, Order::default(), &Constraints::default()).count(), 0);
    assert_eq!(enumerate(usize::MAX, Order::default(), &Constraints::default()).count(), 0);
}

/// Mixtral 8x22B on 128 ranks.
fn mixtral() -> Constraints {
    Constraints {
        tp: 1..=8,
        etp: 1..=1,
        vpp: 7,
        num_attention_heads: Some(48),
        num_key_value_heads: Some(8),
        num_experts: Some(8),
        moe_intermediate_size: Some(16384),
        num_hidden_layers: Some(56),
        sequence_length: Some(4096),
        global_batch_size: Some(256),
        ..Constraints::default()
    }
}

#[test]
fn constraints_keep_exactly_what_the_model_allows() {
    let found: BTreeSet<[usize; 5]> =
        enumerate(128, Order::default(), &mixtral()).map(|f| sizes(f.mapping())).collect();
    let expected: BTreeSet<[usize; 5]> = by_definition(128, Order::default())
        .iter()
        .map(sizes)
        .filter(|&[tp, cp, pp, ep, etp]| {
            let dp = 128 / (tp * cp * pp);
            tp <= 8
                && 8 % ep == 0
                && etp == 1
                && pp > 1
                && 56 >= 7 * pp
                && 256 % dp == 0
                && 4096 % (2 * cp * tp) == 0
        })
        .collect();
    assert_eq!(found, expected);
    assert!(found.contains(&[2, 1, 8, 8, 1]), "the paper's mapping");
}

#[test]
fn each_constraint_says_what_it_needs() {
    let legal = Mapping { world_size: 128, tp: 2, pp: 8, ep: 8, ..Mapping::default() };
    mixtral().fold(legal.clone()).unwrap();
    let rule = |mapping: &Mapping, constraints: Constraints| match constraints.fold(mapping.clone()) {
        Err(Error::Illegal { rule, .. }) => rule.to_string(),
        other => panic!("{other:?}"),
    };
    let long = Mapping { tp: 4, cp: 4, ..legal.clone() };
    for (mapping, constraints, expected) in [
        (&legal, Constraints { tp: 1..=1, ..mixtral() }, "tp must be at most 1, but is 2"),
        (&legal, Constraints { etp: 2..=4, ..mixtral() }, "etp must be between 2 and 4, but is 1"),
        (&legal, Constraints { cp: 2..=usize::MAX, ..mixtral() }, "cp must be at least 2, but is 1"),
        (
            &legal,
            Constraints { num_attention_heads: Some(15), ..mixtral() },
            "num_attention_heads must be a multiple of tp, but 15 % 2 = 1",
        ),
        (
            &long,
            Constraints { num_key_value_heads: Some(6), ..mixtral() },
            "tp must divide num_key_value_heads or be a multiple of it, but tp = 4 and num_key_value_heads = 6 \
             (6 % 4 = 2, 4 % 6 = 4)",
        ),
        (
            &legal,
            Constraints { intermediate_size: Some(9), ..mixtral() },
            "intermediate_size must be a multiple of tp, but 9 % 2 = 1",
        ),
        (
            &legal,
            Constraints { shared_expert_intermediate_size: Some(7), ..mixtral() },
            "shared_expert_intermediate_size must be a multiple of tp, but 7 % 2 = 1",
        ),
        (
            &long,
            Constraints { num_attention_heads: Some(24), cp_ulysses: 4, ..mixtral() },
            "num_attention_heads must be a multiple of tp·cp_ulysses, but 24 % (4·4 = 16) = 8",
        ),
        (
            &long,
            Constraints { num_key_value_heads: Some(12), cp_ulysses: 2, ..mixtral() },
            "tp·cp_ulysses must divide num_key_value_heads or be a multiple of it, but tp·cp_ulysses = 4·2 = 8 and \
             num_key_value_heads = 12 (12 % 8 = 4, 8 % 12 = 8)",
        ),
        (
            &long,
            Constraints { cp_ulysses: 3, ..mixtral() },
            "cp must be a multiple of cp_ulysses, but 4 % 3 = 1",
        ),
        (&long, Constraints { cp_ulysses: 0, ..mixtral() }, "cp_ulysses must be at least 1, but is 0"),
        (
            &Mapping { etp: 2, ..legal.clone() },
            Constraints { etp: 1..=2, moe_intermediate_size: Some(9), ..mixtral() },
            "moe_intermediate_size must be a multiple of etp, but 9 % 2 = 1",
        ),
        (
            &legal,
            Constraints { num_hidden_layers: Some(55), ..mixtral() },
            "num_hidden_layers must be at least pp·vpp, but 55 < 8·7 = 56",
        ),
        (
            &long,
            Constraints { sequence_length: Some(12), ..mixtral() },
            "sequence_length must be a multiple of 2·cp, but 12 % (2·4 = 8) = 4",
        ),
        (
            &long,
            Constraints { sequence_length: Some(24), ..mixtral() },
            "sequence_length must be a multiple of cp·tp, but 24 % (4·4 = 16) = 8",
        ),
        (
            &legal,
            Constraints { global_batch_size: Some(20), micro_batch_size: 2, ..mixtral() },
            "global_batch_size must be a multiple of micro_batch_size·dp, but 20 % (2·8 = 16) = 4",
        ),
        (
            &legal,
            Constraints { micro_batch_size: 0, ..mixtral() },
            "micro_batch_size must be at least 1, but is 0",
        ),
        (&legal, Constraints { vpp: 0, ..mixtral() }, "vpp must be at least 1, but is 0"),
        (
            &legal,
            Constraints { num_experts: Some(0), ..mixtral() },
            "num_experts must be at least 1, but is 0",
        ),
        (
            &legal,
            Constraints { global_batch_size: Some(0), ..mixtral() },
            "global_batch_size must be at least 1, but is 0",
        ),
    ] {
        assert_eq!(rule(mapping, constraints), expected);
    }
}

#[test]
fn the_message_has_the_equation_the_values_and_what_is_nearest() {
    let asked = Mapping { world_size: 16, tp: 2, pp: 2, ep: 4, order: Order::DP_LAST, ..Mapping::default() };
    assert_eq!(
        Folding::new(asked).unwrap_err().to_string(),
        "illegal mapping: the pipeline groups of both views must be the same, which with order tp-cp-ep-pp-dp needs \
         tp·cp = etp·ep, but tp·cp = 2·1 = 2 and etp·ep = 1·4 = 4\n\
         asked for: tp 2, cp 1, pp 2, ep 4, etp 1, order tp-cp-ep-pp-dp\n\
         nearest legal mappings of world_size 16:\n  \
         tp 2, cp 1, pp 2, ep 4, etp 1  (order tp-cp-ep-pp-dp -> tp-cp-ep-dp-pp)\n  \
         tp 2, cp 1, pp 1, ep 4, etp 1, order tp-cp-ep-pp-dp  (pp 2 -> 1)\n  \
         tp 2, cp 2, pp 2, ep 4, etp 1, order tp-cp-ep-pp-dp  (cp 1 -> 2)\n  \
         tp 2, cp 1, pp 2, ep 2, etp 1, order tp-cp-ep-pp-dp  (ep 4 -> 2)\n  \
         tp 4, cp 1, pp 2, ep 4, etp 1, order tp-cp-ep-pp-dp  (tp 2 -> 4)"
    );
}

/// A split that does not fit is the number to change, and another split stays.
#[test]
fn a_split_that_does_not_fit_is_left_out() {
    let plain = Mapping { world_size: 8, cp: 4, ..Mapping::default() };
    let ring = plain.clone().split(Attention::CP_INNER, 2);
    let message = |mapping: Mapping| Folding::new(mapping).unwrap_err().to_string();
    assert_eq!(
        message(ring.clone().split(Attention::DP, 2)),
        "illegal mapping: a split gives a size to one digit of one axis, such as cp.inner, not to \"attention dp\"\n\
         asked for: tp 1, cp 4, pp 1, ep 1, etp 1, attention cp.inner 2, attention dp 2\n\
         nearest legal mappings of world_size 8:\n  \
         tp 1, cp 4, pp 1, ep 1, etp 1, attention cp.inner 2  (without attention dp 2)"
    );
    let zero = message(plain.clone().split(Attention::CP_INNER, 0));
    assert!(zero.starts_with("illegal mapping: attention cp.inner must be at least 1, but is 0\n"), "{zero}");
    let any = Constraints::default();
    assert_eq!(nearest(&plain.clone().split(Attention::CP_INNER, 0), &any), vec![plain.clone()]);
    assert_eq!(nearest(&ring.clone().split(Axes::<Expert>::NONE, 2), &any), vec![ring.clone()]);
    // With the size of the axis pinned, only the split can change.
    let pinned = Constraints { cp: 4..=4, ..any };
    assert_eq!(nearest(&plain.clone().split(Attention::CP_OUTER, 3), &pinned), vec![plain]);
    let instances = Mapping { order: "tp-dp-cp-ep-pp".parse().unwrap(), ..ring }.optimizer_instances(2);
    assert!(nearest(&instances, &pinned).contains(&Mapping { order: Order::default(), ..instances }));
}

/// All foldings of these worlds are too many to look at: 33,771,360 of the first.
#[test]
fn what_is_nearest_in_a_large_world_is_found_at_once() {
    for world_size in [100_800, 98_304, 1 << 31] {
        for order in [Order::PP_LAST, Order::DP_LAST] {
            let asked =
                Mapping { world_size, tp: 11, cp: 13, pp: 17, ep: 19, etp: 23, order, ..Mapping::default() };
            let legal = nearest(&asked, &Constraints::default());
            assert_eq!(legal.len(), 5);
            assert!(legal.into_iter().all(|mapping| Folding::new(mapping).is_ok()));
        }
    }
}

/// An instance of the optimizer is one set of ranks for attention and experts.
#[test]
fn optimizer_instances_are_the_same_in_both_views() {
    let rule = |mapping: Mapping| match Folding::new(mapping) {
        Err(Error::Illegal { rule: rule @ Rule::OptimizerInstances { .. }, .. }) => rule.to_string(),
        other => panic!("{other:?}"),
    };
    let order: Order = "tp-dp-cp-ep-pp".parse().unwrap();
    let cp_after_dp = Mapping { world_size: 4, cp: 2, order, ..Mapping::default() };
    assert_eq!(
        rule(cp_after_dp.clone().optimizer_instances(2)),
        "the optimizer instances of both views must be the same, which with order tp-dp-cp-ep-pp needs \
         tp·dp = etp·edp, but tp·dp = 1·2 = 2 and etp·edp = 1·4 = 4"
    );
    assert_eq!(
        rule(Mapping { order: Order::default(), ..cp_after_dp.clone() }.split(Attention::DP_OUTER, 2)),
        "the optimizer instances of both views must be the same, which with order tp-cp-ep-dp-pp needs \
         dp.outer = edp.outer, but dp.outer = 2 and edp.outer = 1"
    );
    for legal in
        [Mapping { ep: 2, ..cp_after_dp.clone() }, Mapping { order: Order::default(), ..cp_after_dp }]
    {
        let folding = Folding::new(legal.optimizer_instances(2)).unwrap();
        let instances = folding.groups(Attention::ALL.minus(Attention::DP_OUTER)).map(|group| group.ranks());
        let expert = folding.groups(Expert::ALL.minus(Expert::EDP_OUTER)).map(|group| group.ranks());
        assert!(instances.eq(expert));
    }
}

/// A rule is an error of its own, for who checks a folding that already is one.
#[test]
fn a_broken_rule_is_an_error() {
    let check = |world_size| -> Result<(), Box<dyn std::error::Error>> {
        mixtral().check(&Folding::new(Mapping { world_size, pp: 2, ..Mapping::default() })?)?;
        Ok(())
    };
    assert!(check(8).is_ok());
    assert_eq!(
        check(6).unwrap_err().to_string(),
        "global_batch_size must be a multiple of micro_batch_size·dp, but 256 % (1·3 = 3) = 1"
    );
    let large = Folding::new(Mapping { world_size: 1 << 32, ..Mapping::default() }).unwrap_err();
    assert!(large.to_string().contains("world_size must be below 2^32, but is 4294967296"), "{large}");
}

#[test]
fn nothing_a_caller_can_write_panics() {
    let huge = usize::MAX;
    for mapping in [
        Mapping { world_size: 0, ..Mapping::default() },
        Mapping { tp: 0, ..Mapping::default() },
        Mapping { world_size: 8, etp: 0, ..Mapping::default() },
        Mapping { world_size: huge, ..Mapping::default() },
        Mapping { world_size: 8, tp: huge, cp: 2, ..Mapping::default() },
        Mapping { world_size: 8, ep: huge, etp: huge, pp: huge, ..Mapping::default() },
        Mapping { world_size: 8, ..Mapping::default() }.split(Attention::DP_INNER, 0),
        Mapping { world_size: 8, ..Mapping::default() }.split(Attention::DP_INNER, 3),
        Mapping { world_size: 8, ..Mapping::default() }.split(Attention::DP, 2),
        Mapping { world_size: 8, ..Mapping::default() }.split(Attention::DP_INNER | Attention::CP_INNER, 2),
    ] {
        let error = Folding::new(mapping).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
    for order in ["", "-", "tp-", "tp-cp-ep-dp-pp-tp", "gtp_remat-tp-cp-ep-dp-pp", "TP-cp-ep-dp-pp", "tp_cp"]
    {
        let error = order.parse::<Order>().unwrap_err().to_string();
        assert!(error.contains(&format!("\"{order}\"")), "{error}");
    }
}

#[test]
fn the_last_split_of_an_axis_counts() {
    let mapping = Mapping { world_size: 8, cp: 4, ..Mapping::default() }.split(Attention::CP_INNER, 3);
    let split = mapping.split(Attention::CP_OUTER, 4).optimizer_instances(2);
    assert_eq!(
        split.to_string(),
        "tp 1, cp 4, pp 1, ep 1, etp 1, attention cp.outer 4, attention dp.outer 2, expert edp.outer 2"
    );
    let folding = Folding::new(split).unwrap();
    assert_eq!([Attention::CP_INNER, Attention::CP_OUTER].map(|digit| folding.size(digit)), [1, 4]);
    assert_eq!([Attention::DP_INNER, Attention::DP_OUTER].map(|digit| folding.size(digit)), [1, 2]);
    assert_eq!([Attention::TP_INNER, Attention::TP_OUTER].map(|digit| folding.size(digit)), [1, 1]);
    let none = Axes::<Expert>::NONE;
    let twice = Mapping::default().split(none, 2).split(none, 3);
    assert!(twice.splits.iter().eq([(none.into(), 3)]));
    let whole = Folding::new(Mapping { world_size: 8, cp: 4, ..Mapping::default() }).unwrap();
    assert_eq!([Attention::CP_INNER, Attention::CP_OUTER].map(|digit| whole.size(digit)), [4, 1]);
}

#[test]
fn an_axis_of_size_one_may_be_left_out_of_the_order() {
    let order: Order = "tp-ep-pp".parse().unwrap();
    assert_eq!(order.to_string(), "tp-ep-pp");
    let mapping = Mapping { world_size: 8, tp: 4, ep: 4, pp: 2, order, ..Mapping::default() };
    Folding::new(mapping.clone()).unwrap();
    let left_out = Folding::new(Mapping { ep: 2, ..mapping }).unwrap_err();
    assert!(matches!(left_out, Error::Illegal { rule: Rule::Unordered { name: "edp", size: 2, .. }, .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No legal mapping changes fewer numbers, or as many by less, than the first that is proposed.
    #[test]
    fn the_nearest_is_the_nearest(
        world_size in prop::sample::select(vec![6usize, 8, 12, 16, 24]),
        [tp, cp, pp, ep, etp] in prop::array::uniform5(1usize..=9),
        dp_last: bool,
    ) {
        let order = if dp_last { Order::DP_LAST } else { Order::PP_LAST };
        let asked = Mapping { world_size, tp, cp, pp, ep, etp, order, ..Mapping::default() };
        let distance = |mapping: &Mapping| {
            let pairs = || sizes(&asked).into_iter().zip(sizes(mapping));
            let changes = pairs().filter(|(a, b)| a != b).count() + usize::from(asked.order != mapping.order);
            (changes, pairs().map(|(a, b)| a.abs_diff(b)).sum::<usize>())
        };
        let mut distances: Vec<_> = by_definition(world_size, order).iter().map(&distance).collect();
        if dp_last {
            distances.extend(by_definition(world_size, Order::PP_LAST).iter().map(&distance));
        }
        distances.sort_unstable();

        let proposed = nearest(&asked, &Constraints::default());
        let proposed: Vec<_> = proposed.iter().map(|mapping| {
            assert!(Folding::new(mapping.clone()).is_ok());
            distance(mapping)
        }).collect();
        let fewest = distances.iter().filter(|(changes, _)| *changes == distances[0].0).count();
        prop_assert_eq!(proposed.len(), fewest.min(5));
        prop_assert_eq!(&proposed[..], &distances[..proposed.len()]);
    }
}
