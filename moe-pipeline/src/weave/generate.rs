//! The order for given costs.

use super::cost::{LayerCost, check};
use super::node::{Node, Step};
use super::order::{Order, nodes};
use super::search::{Chain, Problem};
use crate::Result;

/// The shortest order that is found for a forward pass through layers that cost `forward`, first layer first, and a backward pass
/// through layers that cost `backward`; among equally short ones, that with the fewest [deferred](Order::deferred) weight
/// gradients. The passes may be of different numbers of layers, and either of none.
///
/// The search goes through all orders whose weight gradients come in the order of their input gradients, leaves out what can no
/// longer be the best, and is exact unless more than a thousand beginnings remain of one length, which takes many and uneven
/// layers; of these it then keeps the most promising. The same costs give the same order, on every rank and machine that
/// computes as IEEE 754 says.
///
/// # Errors
/// Costs that are negative or not finite.
pub fn weave(forward: &[LayerCost], backward: &[LayerCost]) -> Result<Order> {
    check(forward)?;
    check(backward)?;
    let layers = |costs: &[LayerCost]| costs.iter().map(LayerCost::layer).collect::<Vec<_>>();
    let (layers, back) = (layers(forward), layers(backward));
    let nodes = nodes(&layers, &back);
    let [of_forward, of_inputs, of_weights] = &nodes;
    let times = |nodes: &[Node], costs: &[LayerCost]| -> Chain {
        nodes.iter().map(|&node| (node.part.is_all_to_all(), costs[node.layer as usize].time(node))).collect()
    };
    let problem =
        Problem::new([times(of_forward, forward), times(of_inputs, backward), times(of_weights, backward)]);
    let mut next = nodes.each_ref().map(|nodes| nodes.iter().copied());
    let taken = problem.solve().into_iter().filter_map(|chain| Some((chain, next[chain].next()?)));
    Order::new(layers, back, steps(taken))
}

/// The steps of nodes taken from chains in this order: each all-to-all is waited for as late as can be, before the next node of
/// its chain or at the end.
fn steps(taken: impl Iterator<Item = (usize, Node)>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut under_way: Vec<(usize, Node)> = Vec::new();
    for (chain, node) in taken {
        if let Some(at) = under_way.iter().position(|(other, _)| *other == chain) {
            steps.push(Step::Wait(under_way.remove(at).1));
        }
        match node.part.is_all_to_all() {
            true => {
                steps.push(Step::Start(node));
                under_way.push((chain, node));
            }
            false => steps.push(Step::Compute(node)),
        }
    }
    steps.extend(under_way.into_iter().map(|(_, node)| Step::Wait(node)));
    steps
}
