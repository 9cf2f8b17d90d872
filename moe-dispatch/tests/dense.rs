//! For distinct tokens on every rank, any folding and any skew: dispatch, experts, combine and all gradients equal a
//! one-rank dense layer, by either dispatcher.

mod layer;

use std::ops::Range;
use std::sync::Arc;

use layer::{Problem, Skew, world};
use moe_dispatch::DispatcherKind;
use moe_dispatch::capacity::DropPolicy;
use moe_kernels::family::ScoreFunction;
use moe_topology::{Attention, Folding, Mapping};
use proptest::prelude::*;

/// A folding without pipeline, and how many tokens each rank has.
#[derive(Debug, Clone)]
struct Case {
    mapping: Mapping,
    tokens: Vec<usize>,
    problem: Problem,
}

impl Case {
    fn folding(&self) -> Folding {
        Folding::new(self.mapping.clone()).expect("a legal folding")
    }

    fn shares(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let share = |&tokens| {
            let start = end;
            end += tokens;
            start..end
        };
        self.tokens.iter().map(share).collect()
    }

    /// Tokens of a data-parallel rank are one micro-batch.
    fn with_units(mut self) -> Self {
        let folding = self.folding();
        let unit = |rank| folding.coordinate(rank, Attention::DP);
        self.problem.units = self
            .tokens
            .iter()
            .enumerate()
            .flat_map(|(rank, &n)| std::iter::repeat_n(unit(rank), n))
            .collect();
        self.problem.num_units = folding.size(Attention::DP);
        self
    }

    /// Both dispatchers against the reference and each other, in f64.
    fn check(&self) {
        let (problem, folding, shares) = (Arc::new(self.problem.clone()), self.folding(), self.shares());
        let expected = problem.solve();
        let by = |kind| world::run::<f64>(&problem, &folding, &shares, kind);
        let [by_all_to_all, by_all_gather] = DispatcherKind::ALL.map(by);
        by_all_to_all.assert_close(&expected, 1e-11);
        by_all_gather.assert_close(&expected, 1e-11);
        by_all_gather.assert_close(&by_all_to_all, 1e-12);
    }
}

fn problem(num_experts: usize, top_k: usize, skew: Skew, seed: u64) -> Problem {
    Problem {
        hidden: 5,
        intermediate: 24,
        num_experts,
        top_k,
        score: ScoreFunction::SoftmaxPost,
        aux_loss_coef: 0.3,
        z_loss_coef: 0.1,
        skew,
        seed,
        units: vec![],
        num_units: 0,
        capacity: None,
    }
}

fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

#[test]
fn every_folding_of_eight_ranks() {
    let mut seed = 0;
    for tp in divisors(8) {
        for ep in divisors(8) {
            for etp in divisors(8 / ep) {
                seed += 1;
                let skew = [Skew::None, Skew::Empty, Skew::ToOne][seed as usize % 3];
                let mapping = Mapping { world_size: 8, tp, ep, etp, ..Mapping::default() };
                // Rank 2 has no tokens.
                let tokens = vec![3, 1, 0, 5, 2, 4, 1, 3];
                Case { mapping, tokens, problem: problem(8, 2, skew, seed) }.with_units().check();
            }
        }
    }
}

fn scores() -> impl Strategy<Value = ScoreFunction> {
    prop_oneof![
        Just(ScoreFunction::SoftmaxPost),
        any::<bool>().prop_map(|normalize| ScoreFunction::SoftmaxPre { normalize }),
        any::<bool>().prop_map(|normalize| ScoreFunction::Sigmoid { normalize }),
    ]
}

fn skews() -> impl Strategy<Value = Skew> {
    prop_oneof![Just(Skew::None), Just(Skew::Empty), Just(Skew::ToOne)]
}

/// None, one choice each, some, all.
fn capacities() -> impl Strategy<Value = Option<(f64, DropPolicy)>> {
    let policy = prop_oneof![Just(DropPolicy::Probs), Just(DropPolicy::Position)];
    prop_oneof![
        1 => Just(None),
        3 => (prop_oneof![Just(1e-9), 0.3..1.5, Just(1e9)], policy).prop_map(Some),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let worlds = prop_oneof![Just(1usize), Just(2), Just(4), Just(6), Just(8)];
    let order = prop_oneof![Just("tp-cp-ep-dp-pp"), Just("ep-tp-cp-dp-pp"), Just("cp-tp-ep-dp-pp")];
    let foldings = (worlds, order).prop_flat_map(|(world_size, order)| {
        let mut mappings = vec![];
        for tp in divisors(world_size) {
            for cp in divisors(world_size / tp) {
                for ep in divisors(world_size) {
                    for etp in divisors(world_size / ep) {
                        let order = order.parse().expect("an order");
                        let mapping = Mapping { world_size, tp, cp, ep, etp, order, ..Mapping::default() };
                        if Folding::new(mapping.clone()).is_ok() {
                            mappings.push(mapping);
                        }
                    }
                }
            }
        }
        proptest::sample::select(mappings)
    });
    let sizes = (1usize..4, 1usize..4, skews(), scores(), capacities(), any::<u64>());
    (foldings, sizes).prop_flat_map(|(mapping, (per_rank, top_k, skew, score, capacity, seed))| {
        let num_experts = (mapping.ep * per_rank).max(2).next_multiple_of(mapping.ep);
        let problem = Problem { score, capacity, ..problem(num_experts, top_k.min(num_experts), skew, seed) };
        let count = prop_oneof![2 => Just(0), 5 => 0..6usize];
        proptest::collection::vec(count, mapping.world_size).prop_map(move |tokens| {
            Case { mapping: mapping.clone(), tokens, problem: problem.clone() }.with_units()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn any_folding_equals_one_rank(case in cases()) {
        prop_assume!(case.problem.margin() > 1e-9);
        case.check();
    }
}

/// All choose one expert, of which few are kept: most tokens get nothing from it, and the router still learns.
#[test]
fn dropping_under_every_folding_of_eight_ranks() {
    for (seed, (tp, ep, etp)) in
        [(1, 1, 1), (2, 4, 2), (4, 8, 1), (8, 1, 8), (8, 2, 2)].into_iter().enumerate()
    {
        for policy in [DropPolicy::Probs, DropPolicy::Position] {
            let skew = [Skew::ToOne, Skew::Empty][seed % 2];
            let mapping = Mapping { world_size: 8, tp, ep, etp, ..Mapping::default() };
            let tokens = vec![3, 1, 0, 5, 2, 4, 1, 3];
            let problem = Problem { capacity: Some((0.7, policy)), ..problem(8, 2, skew, 60 + seed as u64) };
            let case = Case { mapping, tokens, problem }.with_units();
            assert!(case.problem.solve().dropped > 5);
            case.check();
        }
    }
}

#[test]
fn no_tokens_at_all() {
    for (world_size, ep, etp) in [(1, 1, 1), (4, 2, 2)] {
        let mapping = Mapping { world_size, ep, etp, ..Mapping::default() };
        Case { mapping, tokens: vec![0; world_size], problem: problem(4, 2, Skew::None, 1) }
            .with_units()
            .check();
    }
}

#[test]
fn in_single_precision() {
    for (seed, (tp, ep, etp)) in [(1, 8, 1), (2, 2, 4), (4, 1, 8), (2, 4, 1)].into_iter().enumerate() {
        let mapping = Mapping { world_size: 8, tp, ep, etp, ..Mapping::default() };
        let tokens = vec![3, 1, 0, 5, 2, 4, 1, 3];
        let case =
            Case { mapping, tokens, problem: problem(8, 2, Skew::None, 40 + seed as u64) }.with_units();
        assert!(case.problem.margin() > 1e-4, "seed {seed}: a near tie may fall otherwise in f32");
        let problem = Arc::new(case.problem.clone());
        for kind in DispatcherKind::ALL {
            let single = world::run::<f32>(&problem, &case.folding(), &case.shares(), kind);
            single.assert_close(&problem.solve(), 2e-5);
        }
    }
}
