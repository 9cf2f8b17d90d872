//! Random foldings, and the definition of a group to hold them to.
#![allow(dead_code)] // each test file uses a part

use moe_topology::{Attention, Axes, Expert, Folding, Mapping, Order, View};
use proptest::prelude::*;

/// The eight digits of each view: inner and outer of its four axes.
pub const ATTENTION: [Axes<Attention>; 8] = [
    Attention::TP_INNER,
    Attention::TP_OUTER,
    Attention::CP_INNER,
    Attention::CP_OUTER,
    Attention::DP_INNER,
    Attention::DP_OUTER,
    Attention::PP_INNER,
    Attention::PP_OUTER,
];
pub const EXPERT: [Axes<Expert>; 8] = [
    Expert::ETP_INNER,
    Expert::ETP_OUTER,
    Expert::EP_INNER,
    Expert::EP_OUTER,
    Expert::EDP_INNER,
    Expert::EDP_OUTER,
    Expert::PP_INNER,
    Expert::PP_OUTER,
];

pub fn axes<V: View>(digits: [Axes<V>; 8], mask: u8) -> Axes<V> {
    (0..8).filter(|digit| mask >> digit & 1 == 1).fold(Axes::NONE, |all, digit| all | digits[digit])
}

/// One of the divisors of `n`.
fn divisor(n: usize, choice: usize) -> usize {
    let divisors: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
    divisors[choice % divisors.len()]
}

/// A folding, and the sizes of the digits that were asked for, per view in the order of [`ATTENTION`], [`EXPERT`].
#[derive(Clone, Debug)]
pub struct Sample {
    pub folding: Folding,
    pub attention: [usize; 8],
    pub expert: [usize; 8],
}

/// Any order of the axes with any sizes and any splits, up to 144 ranks. What is tried on the way is refused where the
/// views do not share, by the definition, their pipelines and their optimizer instances, and only there.
pub fn sample() -> impl Strategy<Value = Sample> {
    let stage = prop::sample::select(vec![1usize, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 30, 36]);
    let order = Just(["tp", "cp", "ep", "dp", "pp"]).prop_shuffle();
    (stage, 1usize..=4, order, any::<bool>(), any::<[usize; 12]>()).prop_map(
        |(stage, pp, mut order, pp_last, choice)| {
            let tp = divisor(stage, choice[0]);
            let cp = divisor(stage / tp, choice[1]);
            let etp = divisor(stage, choice[2]);
            let ep = divisor(stage / etp, choice[3]);
            let attention = [tp, cp, stage / tp / cp, pp];
            let expert = [etp, ep, stage / etp / ep, pp];
            let mapping = |order: [&str; 5]| {
                let order = order.join("-").parse().unwrap();
                Mapping { world_size: stage * pp, tp, cp, pp, ep, etp, order, ..Mapping::default() }
            };
            let [mut attention_digits, mut expert_digits] = [attention, expert]
                .map(|sizes| std::array::from_fn(|digit| [sizes[digit / 2], 1][digit % 2]));
            let legal = agree(&mapping(order), attention_digits, expert_digits, &PP);
            assert_eq!(Folding::new(mapping(order)).is_ok(), legal, "same pipelines");
            if pp_last || !legal {
                let place = order.iter().position(|name| *name == "pp").unwrap();
                order[place..].rotate_left(1);
            }

            let mut mapping = mapping(order);
            for axis in [0, 1, 3] {
                let inner = divisor(attention[axis], choice[4 + axis]);
                attention_digits[2 * axis] = inner;
                attention_digits[2 * axis + 1] = attention[axis] / inner;
                mapping = mapping.split(ATTENTION[2 * axis], inner);
                let outer = divisor(expert[axis], choice[8 + axis]);
                expert_digits[2 * axis] = expert[axis] / outer;
                expert_digits[2 * axis + 1] = outer;
                mapping = mapping.split(EXPERT[2 * axis + 1], outer);
            }

            let [dp, edp] = [attention[2], expert[2]];
            let outer = divisor(dp, choice[6]);
            let as_many = edp.is_multiple_of(outer) && choice[10].is_multiple_of(4);
            let expert_outer = if as_many { outer } else { divisor(edp, choice[10]) };
            let split =
                mapping.clone().split(Attention::DP_INNER, dp / outer).split(Expert::EDP_OUTER, expert_outer);
            let (mut attention_split, mut expert_split) = (attention_digits, expert_digits);
            attention_split[4..6].copy_from_slice(&[dp / outer, outer]);
            expert_split[4..6].copy_from_slice(&[edp / expert_outer, expert_outer]);
            let legal = agree(&split, attention_split, expert_split, &INSTANCES);
            assert_eq!(Folding::new(split.clone()).is_ok(), legal, "same optimizer instances");
            if legal {
                (mapping, attention_digits, expert_digits) = (split, attention_split, expert_split);
            }
            let folding = Folding::new(mapping).unwrap();
            Sample { folding, attention: attention_digits, expert: expert_digits }
        },
    )
}

/// The digits that both views must share.
const INSTANCES: [usize; 1] = [5];
const PP: [usize; 2] = [6, 7];

/// Whether every rank has the same of these digits in both views.
fn agree(mapping: &Mapping, attention: [usize; 8], expert: [usize; 8], digits: &[usize]) -> bool {
    (0..mapping.world_size).all(|rank| {
        let dense = digits_of(rank, mapping.order, Attention::AXES, attention);
        let moe = digits_of(rank, mapping.order, Expert::AXES, expert);
        digits.iter().all(|&digit| dense[digit] == moe[digit])
    })
}

/// The digits of a rank by the definition: count it up in the written order.
pub fn digits_of(rank: usize, order: Order, names: [&str; 4], sizes: [usize; 8]) -> [usize; 8] {
    let mut rest = rank;
    let mut digits = [0; 8];
    for token in order.to_string().split('-') {
        let Some(axis) = names.iter().position(|name| *name == token || *name == format!("e{token}")) else {
            continue;
        };
        for digit in [2 * axis, 2 * axis + 1] {
            digits[digit] = rest % sizes[digit];
            rest /= sizes[digit];
        }
    }
    assert_eq!(rest, 0);
    digits
}

/// The group of a rank by the definition: all ranks that agree with it on every other digit.
pub fn group_of<V: View>(folding: &Folding, sizes: [usize; 8], rank: usize, mask: u8) -> Vec<usize> {
    let digits = |rank| digits_of(rank, folding.mapping().order, V::AXES, sizes);
    let mine = digits(rank);
    let agrees = |other: &usize| {
        let theirs = digits(*other);
        (0..8).all(|digit| mask >> digit & 1 == 1 || mine[digit] == theirs[digit])
    };
    (0..folding.world_size()).filter(agrees).collect()
}
