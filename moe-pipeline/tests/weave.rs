//! Woven orders against brute force, bounds, Megatron's order and mutants.

mod common;

use common::Draws;
use moe_pipeline::weave::{Layer, LayerCost, Node, Order, Part, Phase, Step, weave};
use moe_pipeline::{Error, StageCost};
use proptest::prelude::*;

fn cost(times: [f64; 3]) -> StageCost {
    let [forward, backward_input, backward_weight] = times;
    StageCost { forward, backward_input, backward_weight }
}

fn moe(attention: [f64; 3], experts: [f64; 3], all_to_all: f64) -> LayerCost {
    LayerCost::Moe { attention: cost(attention), experts: cost(experts), all_to_all }
}

/// Costs that binary floating point adds exactly.
fn draw_layer(draws: &mut Draws) -> LayerCost {
    let mut draw = || draws.below(33) as f64 / 8.0;
    let mut three = || [draw(), draw(), draw()];
    let (attention, experts, dense) = (three(), three(), three());
    match draws.below(4) {
        0 => LayerCost::Dense(cost(dense)),
        _ => moe(attention, experts, dense[0]),
    }
}

fn draw_layers(layers: usize, draws: &mut Draws) -> Vec<LayerCost> {
    (0..layers).map(|_| draw_layer(draws)).collect()
}

fn all(passes: [&[LayerCost]; 2], of: impl Fn(StageCost, f64) -> f64) -> f64 {
    let total = |cost: &LayerCost, backward: bool| match *cost {
        LayerCost::Dense(cost) => of(if backward { back(cost) } else { front(cost) }, 0.0),
        LayerCost::Moe { attention, experts, all_to_all } => {
            let side = if backward { back } else { front };
            of(side(attention), all_to_all) + of(side(experts), all_to_all)
        }
    };
    passes[0].iter().map(|c| total(c, false)).sum::<f64>()
        + passes[1].iter().map(|c| total(c, true)).sum::<f64>()
}

fn front(cost: StageCost) -> StageCost {
    StageCost { backward_input: 0.0, backward_weight: 0.0, ..cost }
}

fn back(cost: StageCost) -> StageCost {
    StageCost { forward: 0.0, ..cost }
}

fn busy(cost: StageCost) -> f64 {
    cost.forward + cost.backward_input + cost.backward_weight
}

fn makespan(forward: &[LayerCost], backward: &[LayerCost]) -> f64 {
    weave(forward, backward).unwrap().simulate(forward, backward).unwrap().makespan
}

/// The length of the order that is found, and how many weight gradients it puts off at once.
fn found(forward: &[LayerCost], backward: &[LayerCost]) -> (f64, usize) {
    let order = weave(forward, backward).unwrap();
    (order.simulate(forward, backward).unwrap().makespan, order.deferred())
}

/// Every order there is: recursion over which pass goes on, times kept as the rules of the lanes say. (Weight gradients in the order
/// of their input gradients; waits as late as can be, which is never worse.)
struct Brute {
    chains: [Vec<(bool, f64)>; 2],
    /// Time of each weight gradient, and how many nodes of the backward chain it needs.
    weights: Vec<(usize, f64)>,
    /// The shortest length, and the fewest weight gradients that are put off at once in an order of this length.
    best: (f64, usize),
}

impl Brute {
    fn best(forward: &[LayerCost], backward: &[LayerCost]) -> (f64, usize) {
        let ahead = |layer: &LayerCost| match *layer {
            LayerCost::Dense(c) => vec![(false, c.forward)],
            LayerCost::Moe { attention: a, experts: e, all_to_all: x } => {
                vec![(false, a.forward), (true, x), (false, e.forward), (true, x)]
            }
        };
        let (mut behind, mut weights) = (Vec::new(), Vec::new());
        for layer in backward.iter().rev() {
            let mut gradient = |all_to_all: f64, cost: Option<StageCost>| match cost {
                None => behind.push((true, all_to_all)),
                Some(cost) => {
                    behind.push((false, cost.backward_input));
                    weights.push((behind.len(), cost.backward_weight));
                }
            };
            match *layer {
                LayerCost::Dense(c) => gradient(0.0, Some(c)),
                LayerCost::Moe { attention, experts, all_to_all } => {
                    gradient(all_to_all, None);
                    gradient(0.0, Some(experts));
                    gradient(all_to_all, None);
                    gradient(0.0, Some(attention));
                }
            }
        }
        let chains = [forward.iter().flat_map(ahead).collect(), behind];
        let mut brute = Brute { chains, weights, best: (f64::INFINITY, 0) };
        brute.go([0; 3], 0.0, [0.0; 2], 0.0, 0);
        brute.best
    }

    fn go(&mut self, done: [usize; 3], now: f64, arrives: [f64; 2], free: f64, deferred: usize) {
        let possible = self.weights.iter().filter(|(needs, _)| *needs <= done[1]).count();
        let deferred = deferred.max(possible - done[2]);
        if done == [self.chains[0].len(), self.chains[1].len(), self.weights.len()] {
            let made = (now.max(arrives[0]).max(arrives[1]), deferred);
            self.best = if made < self.best { made } else { self.best };
            return;
        }
        for chain in 0..2 {
            let Some(&(all_to_all, time)) = self.chains[chain].get(done[chain]) else { continue };
            let (mut done, mut arrives, now) = (done, arrives, now.max(arrives[chain]));
            done[chain] += 1;
            if all_to_all {
                arrives[chain] = now.max(free) + time;
                self.go(done, now, arrives, arrives[chain], deferred);
            } else {
                self.go(done, now + time, arrives, free, deferred);
            }
        }
        if let Some(&(needs, time)) = self.weights.get(done[2])
            && needs <= done[1]
        {
            self.go([done[0], done[1], done[2] + 1], now + time, arrives, free, deferred);
        }
    }
}

/// Megatron-LM's order of a pair of layers (`combined_1f1b`), the weight gradient of attention at once after its input gradient.
fn megatron(layers: u32) -> Order {
    let pair = |at: u32| {
        let back = layers - 1 - at;
        format!(
            "{back}I_COMBINE,{at}F_ATTENTION,{back}I_WAIT_COMBINE,{back}I_EXPERTS,{at}F_DISPATCH,{back}W_EXPERTS,\
             {back}I_DISPATCH,{at}F_WAIT_DISPATCH,{at}F_EXPERTS,{at}F_COMBINE,{back}I_WAIT_DISPATCH,{back}I_ATTENTION,\
             {back}W_ATTENTION,{at}F_WAIT_COMBINE"
        )
    };
    (0..layers).map(pair).collect::<Vec<_>>().join(",").parse().unwrap()
}

#[test]
fn the_fuller_lane_is_always_busy_where_layers_are_even() {
    // Per layer six computes of 1 and four all-to-alls of x. Once in all, however many layers: the first all-to-all has one
    // compute beside it, so x − 1 of it shows, where compute is the limit; where all-to-alls are, that lane waits once for 2 − x.
    for layers in 1..=6_u32 {
        for x in [0.0, 0.25, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0, 5.0] {
            let costs = vec![moe([1.0; 3], [1.0; 3], x); layers as usize];
            let once = f64::min(x - 1.0, 2.0 - x).max(0.0);
            let expected = f64::from(layers) * f64::max(6.0, 4.0 * x) + once;
            // And each weight gradient follows its input gradient before the next one.
            assert_eq!(found(&costs, &costs), (expected, 1), "{layers} layers, all-to-all {x}");
        }
    }
}

/// What the module's documentation says of costs that are not known: an order made for all-to-alls of 1.5 is the shortest for any
/// others where layers of experts (`M`) are as many in both passes, and nearly so among dense ones (`D`, of two computes) and in
/// uneven passes. It puts off no more weight gradients than a backward pass of its own does.
#[test]
fn an_order_for_equal_lanes_serves_any() {
    let stage = |layers: &str, x| -> Vec<LayerCost> {
        let layer = |kind| match kind {
            'M' => moe([1.0; 3], [1.0; 3], x),
            _ => LayerCost::Dense(cost([2.0; 3])),
        };
        layers.chars().map(layer).collect()
    };
    let cases = [
        ("M", "M", 1.0),
        ("MM", "MM", 1.0),
        ("MMMM", "MMMM", 1.0),
        ("MMMMMMMM", "MMMMMMMM", 1.0),
        ("DM", "DM", 1.1),
        ("DMMM", "DMMM", 1.1),
        ("DMM", "MMM", 1.1),
        ("MMM", "DMM", 1.1),
        ("DDDM", "MMMM", 1.1),
        ("MMMM", "DDDM", 1.1),
        ("MMMMMM", "MMMMM", 1.1),
        ("MM", "MMMM", 1.1),
        ("DDD", "MMM", 1.0),
        ("MMM", "DDD", 1.0),
        ("MMMM", "MM", 1.2),
        ("", "MM", 1.0),
    ];
    for (forward, backward, most) in cases {
        let order = weave(&stage(forward, 1.5), &stage(backward, 1.5)).unwrap();
        assert!(order.deferred() <= 2, "{forward} {backward}: {}", order.deferred());
        for x in [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0] {
            let (f, b) = (stage(forward, x), stage(backward, x));
            let took = order.simulate(&f, &b).unwrap().makespan;
            assert!(took <= most * makespan(&f, &b), "{forward} {backward}, all-to-all {x}: {took}");
        }
    }
}

#[test]
fn a_pass_alone_is_its_chain() {
    let layers = [moe([1.0, 2.0, 0.5], [3.0, 4.0, 0.25], 1.5), LayerCost::Dense(cost([5.0, 6.0, 7.0]))];
    assert_eq!(makespan(&layers, &[]), layers.iter().map(|layer| layer.alone().forward).sum::<f64>());
    // Weight gradients hide all-to-alls of the backward pass itself: all but the first, which has nothing beside it, and of
    // the second what 7 do not fill.
    assert_eq!(makespan(&[], &layers[1..]), 13.0);
    assert_eq!(makespan(&[], &layers), 6.0 + 7.0 + 4.0 + 1.5 + 2.0 + 0.5);
    assert_eq!(makespan(&[], &[]), 0.0);
    let order = weave(&[], &[]).unwrap();
    assert_eq!((order.steps(), order.to_string().as_str()), (&[][..], ""));
}

#[test]
fn faults_are_named() {
    let good = "0I_COMBINE,0F_ATTENTION,0F_DISPATCH,0I_WAIT_COMBINE,0I_EXPERTS,0I_DISPATCH,0F_WAIT_DISPATCH,0F_EXPERTS,\
                0F_COMBINE,0W_EXPERTS,0I_WAIT_DISPATCH,0I_ATTENTION,0W_ATTENTION,0F_WAIT_COMBINE";
    let order: Order = good.parse().unwrap();
    assert_eq!((order.forward(), order.backward()), (&[Layer::Moe][..], &[Layer::Moe][..]));
    let starts: Vec<String> = order.all_to_alls().map(|node| Step::Start(node).to_string()).collect();
    assert_eq!(starts, ["0I_COMBINE", "0F_DISPATCH", "0I_DISPATCH", "0F_COMBINE"]);
    let error = |text: String| text.parse::<Order>().unwrap_err().to_string();
    for (from, to, message) in [
        (
            "0F_ATTENTION,0F_DISPATCH",
            "0F_DISPATCH,0F_ATTENTION",
            "step 1, 0F_DISPATCH: needs 0F_ATTENTION before it",
        ),
        ("0F_DISPATCH,", "", "step 5, 0F_WAIT_DISPATCH: needs 0F_DISPATCH before it"),
        ("0I_EXPERTS,0I_DISPATCH", "0I_EXPERTS,0I_DISPATCH,0I_DISPATCH", "step 6, 0I_DISPATCH: done before"),
        ("0W_EXPERTS,", "", "0W_EXPERTS is never done"),
        (
            "0I_WAIT_COMBINE,0I_EXPERTS",
            "0W_EXPERTS,0I_WAIT_COMBINE",
            "step 3, 0W_EXPERTS: needs 0I_EXPERTS before it",
        ),
        ("0W_ATTENTION", "0W_DENSE", "step 12, 0W_DENSE: neither pass has it"),
        ("0W_ATTENTION", "0W_COMBINE", "step 12, 0W_COMBINE: neither pass has it"),
        ("0F_EXPERTS", "4000000000F_EXPERTS", "step 7, 4000000000F_EXPERTS: neither pass has it"),
        (
            "0F_EXPERTS",
            "0F_WAIT_EXPERTS",
            "\"0F_WAIT_EXPERTS\" is not a step; steps read like 0F_ATTENTION, 3I_WAIT_COMBINE",
        ),
        (
            "0F_EXPERTS",
            "0X_EXPERTS",
            "\"0X_EXPERTS\" is not a step; steps read like 0F_ATTENTION, 3I_WAIT_COMBINE",
        ),
    ] {
        assert_eq!(error(good.replace(from, to)), message);
    }
    // Steps that cannot be written either.
    let start = Step::Start(Node::new(0, Phase::Forward, Part::Dense));
    let error = Order::new(vec![Layer::Dense], Vec::new(), vec![start]).unwrap_err();
    assert_eq!(error, Error::UnknownStep { index: 0, step: start });

    let (moe, dense) = (moe([1.0; 3], [1.0; 3], 1.0), LayerCost::Dense(cost([1.0; 3])));
    assert_eq!(order.simulate(&[], &[moe]), Err(Error::CostCount { what: "layers", expected: 1, got: 0 }));
    assert_eq!(
        order.simulate(&[moe], &[dense]),
        Err(Error::LayerCost { pass: "backward", index: 0, expected: Layer::Moe })
    );
    let negative = LayerCost::Dense(cost([1.0, -1.0, 1.0]));
    assert_eq!(weave(&[moe, negative], &[]), Err(Error::Cost { what: "layer", index: 1, value: -1.0 }));
    assert!(matches!(
        weave(
            &[],
            &[LayerCost::Moe { attention: cost([1.0; 3]), experts: cost([1.0; 3]), all_to_all: f64::NAN }]
        ),
        Err(Error::Cost { what: "layer", index: 0, .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Any layers of few: no order is shorter, and none as short puts off fewer weight gradients.
    #[test]
    fn no_order_is_better(sizes in prop::sample::select(vec![(1, 1), (1, 2), (2, 1), (0, 2), (2, 0)]), seed: u64) {
        let mut draws = Draws(seed);
        let (forward, backward) = (draw_layers(sizes.0, &mut draws), draw_layers(sizes.1, &mut draws));
        prop_assert_eq!(found(&forward, &backward), Brute::best(&forward, &backward));
    }

    /// Also of many layers, the order with each weight gradient moved to where the next all-to-all of the backward pass has started
    /// (or to the end) is no better.
    #[test]
    fn weight_gradients_are_put_off_for_gain_only(l1 in 0_usize..=6, l2 in 1_usize..=6, seed: u64) {
        let mut draws = Draws(seed);
        let (forward, backward) = (draw_layers(l1, &mut draws), draw_layers(l2, &mut draws));
        let order = weave(&forward, &backward).unwrap();
        let (mut moved, mut possible) = (Vec::new(), Vec::new());
        for &step in order.steps().iter().filter(|step| step.node().phase != Phase::WeightGradient) {
            moved.push(step);
            match step {
                Step::Compute(node) if node.phase == Phase::InputGradient => {
                    possible.push(Step::Compute(Node { phase: Phase::WeightGradient, ..node }));
                }
                Step::Start(node) if node.phase == Phase::InputGradient => moved.append(&mut possible),
                _ => {}
            }
        }
        moved.append(&mut possible);
        let moved = Order::new(order.forward().to_vec(), order.backward().to_vec(), moved).unwrap();
        let took = moved.simulate(&forward, &backward).unwrap().makespan;
        prop_assert!(found(&forward, &backward) <= (took, moved.deferred()));
    }

    /// Any layers, also many: no shorter than either lane's work or either chain, no longer than the passes one after the other, with
    /// every node once on its lane, and the same after a trip through text.
    #[test]
    fn an_overlap_is_within_its_bounds(l1 in 0_usize..=6, l2 in 0_usize..=6, seed: u64) {
        let mut draws = Draws(seed);
        let (forward, backward) = (draw_layers(l1, &mut draws), draw_layers(l2, &mut draws));
        let order = weave(&forward, &backward).unwrap();
        let woven = order.simulate(&forward, &backward).unwrap();
        let passes = [&forward[..], &backward[..]];
        let compute = all(passes, |cost, _| busy(cost));
        let all_to_all = all(passes, |_, all_to_all| all_to_all);
        let alone = |costs: &[LayerCost], of: fn(StageCost) -> f64| -> f64 {
            costs.iter().map(|cost| of(cost.alone())).sum()
        };
        let (ahead, behind) = (alone(&forward, |c| c.forward), alone(&backward, |c| c.backward_input));
        for bound in [compute, all_to_all, ahead, behind] {
            prop_assert!(woven.makespan >= bound);
        }
        prop_assert!(woven.makespan <= ahead + behind + alone(&backward, |c| c.backward_weight));
        prop_assert_eq!(woven.exposed(), woven.makespan - compute);
        for lane in [&woven.compute, &woven.all_to_all] {
            prop_assert!(lane.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
        prop_assert_eq!(woven.compute.len() + woven.all_to_all.len() + order.all_to_alls().count(), order.steps().len());
        let again: Order = order.to_string().parse().unwrap();
        prop_assert_eq!(&again, &order);
        prop_assert_eq!(weave(&forward, &backward).unwrap(), order);
    }

    /// On its own ground, as many equal layers forward as backward, Megatron's order is never shorter.
    #[test]
    fn megatrons_order_is_never_shorter(layers in 1_u32..=5, seed: u64) {
        let mut draws = Draws(seed);
        let mut draw = || draws.below(33) as f64 / 8.0;
        let mut three = || [draw(), draw(), draw()];
        let costs = vec![moe(three(), three(), three()[0]); layers as usize];
        let theirs = megatron(layers).simulate(&costs, &costs).unwrap();
        prop_assert!(makespan(&costs, &costs) <= theirs.makespan);
    }

    /// Every step dropped, done twice, or moved to the other side of one that it needs or that needs it.
    #[test]
    fn every_mutant_is_rejected(l1 in 0_usize..=3, l2 in 0_usize..=3, seed: u64) {
        let mut draws = Draws(seed);
        let (forward, backward) = (draw_layers(l1, &mut draws), draw_layers(l2, &mut draws));
        let order = weave(&forward, &backward).unwrap();
        let check = |steps: Vec<Step>| Order::new(order.forward().to_vec(), order.backward().to_vec(), steps);
        let steps = order.steps();
        prop_assert!(check(steps.to_vec()).is_ok());
        for at in 0..steps.len() {
            let mut dropped = steps.to_vec();
            let step = dropped.remove(at);
            prop_assert!(check(dropped.clone()).is_err(), "without {}", step);
            let mut twice = steps.to_vec();
            twice.insert(draws.below(steps.len() + 1), step);
            prop_assert!(check(twice).is_err(), "{} twice", step);
            // The node before it in its chain, and its own start.
            let phase = step.node().phase;
            let chain = |other: &Step| match phase {
                Phase::WeightGradient => *other == Step::Compute(Node { phase: Phase::InputGradient, ..step.node() }),
                _ => other.node().phase == phase,
            };
            if let Some(needed) = steps[..at].iter().rposition(chain) {
                let mut early = dropped;
                early.insert(needed, step);
                prop_assert!(check(early).is_err(), "{} before {}", step, steps[needed]);
                let mut late = steps.to_vec();
                let moved = late.remove(needed);
                late.insert(at, moved);
                prop_assert!(check(late).is_err(), "{} after {}", moved, step);
            }
        }
    }
}
