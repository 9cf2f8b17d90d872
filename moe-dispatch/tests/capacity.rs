//! What experts keep against a naive sort, whatever the order and the split of the tokens.

use std::sync::Arc;
use std::time::Duration;

use moe_comm::{Comms, ThreadRank, ThreadWorld, World};
use moe_dispatch::capacity::{DropPolicy, Spread, drop_excess, expert_capacity, expert_rank_budget};
use moe_dispatch::{Error, Routing, RoutingOn, Shapes};
use moe_kernels::family::DropLimit;
use moe_kernels::{Cpu, Tensor};
use moe_topology::{Attention, Folding, Mapping};
use proptest::prelude::*;

const TOP_K: usize = 2;
const NUM_EXPERTS: usize = 5;

/// Tokens in the order of their slots.
#[derive(Debug, Clone)]
struct Case {
    /// Two experts of each token, a negative one where it is routed nowhere.
    experts: Vec<[i32; TOP_K]>,
    /// Quarters, so that many tie.
    weights: Vec<[f64; TOP_K]>,
    /// Who stands where: token `order[i]` is the `i`-th that ranks hold.
    order: Vec<usize>,
    units: usize,
    factor: f64,
    policy: DropPolicy,
}

impl Case {
    fn limit(&self) -> DropLimit {
        let unit_slots = (self.experts.len() / self.units).max(1);
        let capacity = expert_capacity(self.factor, unit_slots, TOP_K, NUM_EXPERTS).unwrap();
        DropLimit { num_experts: NUM_EXPERTS, unit_slots, capacity }
    }

    /// Every unit and expert in turn: its choices in slot order, sorted by weight if that decides, and cut.
    fn kept(&self) -> Vec<[i32; TOP_K]> {
        let DropLimit { unit_slots, capacity, .. } = self.limit();
        let mut kept = self.experts.iter().map(|experts| experts.map(|e| e.max(-1))).collect::<Vec<_>>();
        for first in (0..self.experts.len()).step_by(unit_slots) {
            for expert in 0..NUM_EXPERTS as i32 {
                let mut rivals = Vec::new();
                for token in first..first + unit_slots {
                    rivals
                        .extend((0..TOP_K).filter(|&k| self.experts[token][k] == expert).map(|k| (token, k)));
                }
                if self.policy == DropPolicy::Probs {
                    // A stable sort keeps the order of slots among equals.
                    rivals.sort_by(|a, b| self.weights[b.0][b.1].total_cmp(&self.weights[a.0][a.1]));
                }
                rivals.iter().skip(capacity).for_each(|&(token, k)| kept[token][k] = -1);
            }
        }
        kept
    }

    /// The tokens that rank `rank` of `ranks` holds, unevenly many.
    fn share(&self, rank: usize, ranks: usize) -> &[usize] {
        let n = self.order.len();
        let end = |rank: usize| n * rank * rank / (ranks * ranks);
        &self.order[end(rank)..end(rank + 1)]
    }

    fn routing(&self, device: &Cpu, tokens: &[usize]) -> Result<RoutingOn<f64, Cpu>, Error> {
        let experts: Vec<i32> = tokens.iter().flat_map(|&token| self.experts[token]).collect();
        let weights: Vec<f64> = tokens.iter().flat_map(|&token| self.weights[token]).collect();
        Ok(Routing {
            experts: Tensor::from_slice(device, tokens.len(), TOP_K, &experts)?,
            weights: Tensor::from_slice(device, tokens.len(), TOP_K, &weights)?,
            tokens: tokens.len(),
            top_k: TOP_K,
            shapes: Shapes::Exact,
        })
    }

    /// What a rank keeps of its tokens, and how many choices it lost.
    fn on_rank(&self, rank: &ThreadRank, folding: &Folding) -> Result<(Vec<i32>, u64), Error> {
        let device = Cpu::poisoned(1);
        let comms = Comms::<Cpu>::builder().attention(Attention::TP).build(rank, &device, folding)?;
        let group = comms.group(Attention::TP)?;
        let counts: Vec<usize> = (0..group.size()).map(|r| self.share(r, group.size()).len()).collect();
        let tokens = self.share(World::<Cpu>::rank(rank), group.size());
        let slots: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let slots = Tensor::from_slice(&device, 1, slots.len(), &slots)?;
        let spread = (group.size() > 1).then_some(Spread { group, tokens: &counts });
        let routing = self.routing(&device, tokens)?;
        let mut dropped = Tensor::<f64, Cpu>::zeros(&device, 1, 1)?;
        let count = Some(dropped.view_mut()?);
        let kept =
            drop_excess::<f64, Cpu>(&device, routing, self.policy, &slots, self.limit(), spread, count)?;
        Ok((kept.experts.to_vec(&device)?, dropped.to_vec(&device)?[0] as u64))
    }
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..4, 0usize..9).prop_flat_map(|(units, per_unit)| {
        let n = units * per_unit;
        let experts = (-2..NUM_EXPERTS as i32, 1..NUM_EXPERTS as i32).prop_map(|(first, step)| {
            [first, if first < 0 { step } else { (first + step) % NUM_EXPERTS as i32 }]
        });
        let weights = (0..4u8, 0..4u8).prop_map(|(a, b)| [f64::from(a) / 4.0, f64::from(b) / 4.0]);
        let policy = prop_oneof![Just(DropPolicy::Probs), Just(DropPolicy::Position)];
        let order = Just((0..n).collect::<Vec<_>>()).prop_shuffle();
        let factor = prop_oneof![Just(1e-9), 0.2..2.0, Just(1e9)];
        let (experts, weights) =
            (proptest::collection::vec(experts, n), proptest::collection::vec(weights, n));
        (experts, weights, order, factor, policy).prop_map(
            move |(experts, weights, order, factor, policy)| Case {
                experts,
                weights,
                order,
                units,
                factor,
                policy,
            },
        )
    })
}

proptest! {
    #[test]
    fn experts_keep_what_a_naive_sort_keeps(case in cases(), ranks in 1usize..4) {
        let (case, kept) = (Arc::new(case.clone()), case.kept());
        let mapping = Mapping { world_size: ranks, tp: ranks, ..Mapping::default() };
        let folding = Folding::new(mapping).unwrap();
        let shared = case.clone();
        let run = move |rank: ThreadRank| shared.on_rank(&rank, &folding);
        let parts = ThreadWorld::run(ranks, Duration::from_secs(20), run).unwrap();
        let mut lost = 0;
        for (rank, (experts, dropped)) in parts.into_iter().enumerate() {
            let tokens = case.share(rank, ranks);
            let expected: Vec<i32> = tokens.iter().flat_map(|&token| kept[token]).collect();
            prop_assert_eq!(&experts, &expected);
            lost += dropped;
        }
        let before = case.experts.iter().flatten().filter(|&&e| e >= 0).count();
        let after = kept.iter().flatten().filter(|&&e| e >= 0).count();
        prop_assert_eq!(lost as usize, before - after);
        let DropLimit { capacity, unit_slots, .. } = case.limit();
        prop_assert!(capacity <= unit_slots);
    }
}

#[test]
fn counts_of_other_tokens_than_a_rank_has_are_refused() {
    let mapping = Mapping { world_size: 2, tp: 2, ..Mapping::default() };
    let folding = Folding::new(mapping).unwrap();
    let rank = move |rank: ThreadRank| -> Result<bool, Error> {
        let device = Cpu::new(1);
        let comms = Comms::<Cpu>::builder().attention(Attention::TP).build(&rank, &device, &folding)?;
        let spread = Spread { group: comms.group(Attention::TP)?, tokens: &[3, 3] };
        let (experts, weights) =
            (Tensor::from_slice(&device, 2, 1, &[0, 1])?, Tensor::from_slice(&device, 2, 1, &[0.5, 0.5])?);
        let routing = Routing { experts, weights, tokens: 2, top_k: 1, shapes: Shapes::Exact };
        let slots = Tensor::from_slice(&device, 1, 2, &[0, 1])?;
        let limit = DropLimit { num_experts: 2, unit_slots: 4, capacity: 1 };
        let policy = DropPolicy::Position;
        let refused = drop_excess::<f64, Cpu>(&device, routing, policy, &slots, limit, Some(spread), None);
        Ok(matches!(refused, Err(Error::Comm(_))))
    };
    assert_eq!(ThreadWorld::run(2, Duration::from_secs(5), rank).unwrap(), [true, true]);
}

#[test]
fn capacities_at_the_edges() {
    let capacity = |factor, slots| expert_capacity(factor, slots, 2, 8);
    // K/E of the tokens, exactly and by a hair; more than all; none.
    assert_eq!(capacity(1.0, 8), Ok(2));
    assert_eq!(capacity(1.0 + 1e-12, 8), Ok(2));
    assert_eq!(capacity(1.0 + 1e-6, 8), Ok(3));
    assert_eq!(expert_capacity(0.1 + 0.2, 10, 1, 1), Ok(3)); // 3.0000000000000004
    for factor in [4.0, 4.5, 1e300, f64::MAX, f64::INFINITY] {
        assert_eq!(capacity(factor, 8), Ok(8));
        assert_eq!(capacity(factor, 0), Ok(0));
    }
    assert_eq!(capacity(f64::MIN_POSITIVE, 8), Ok(1));
    assert_eq!(capacity(1.0, 0), Ok(0));
    assert_eq!(expert_rank_budget(f64::INFINITY, 10, 2, 1), Ok(usize::MAX));
    assert_eq!(expert_rank_budget(f64::INFINITY, 0, 2, 1), Ok(0));

    for factor in [0.0, -1.0, f64::NEG_INFINITY, f64::NAN] {
        assert!(matches!(capacity(factor, 8), Err(Error::Factor { .. })), "{factor}");
        assert!(matches!(expert_rank_budget(factor, 10, 2, 1), Err(Error::Factor { .. })), "{factor}");
    }
    assert_eq!(expert_capacity(1.0, 8, 2, 0), Err(Error::Experts { num_experts: 0, ep: 1 }));
}
