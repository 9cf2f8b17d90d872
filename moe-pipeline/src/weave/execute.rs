//! Runs two passes through their order.

use super::node::{Phase, Step};
use super::order::Order;

/// A pass that can stop after each step: it owns what it needs to go on, and the all-to-all that it has started.
///
/// A forward pass is asked for steps of [`Phase::Forward`], a backward pass for the others, each exactly once and in an order that
/// [`Order::new`] accepts. Dropping a task that has not ended drops the all-to-all it has started.
pub trait Task {
    /// What is lent to each step: the rank's context.
    type Cx;
    /// What the pass makes.
    type Out;
    /// Why a step can fail.
    type Error;

    /// Does a step. A start returns as soon as the all-to-all is under way, a wait as soon as what arrived is in place: what one
    /// of them computes besides is hidden by nothing and hides nothing that the order knows of.
    fn step(&mut self, step: Step, cx: &mut Self::Cx) -> Result<(), Self::Error>;

    /// What was made, after the last step.
    fn finish(self, cx: &mut Self::Cx) -> Result<Self::Out, Self::Error>;
}

/// Does the steps of both passes in their order.
///
/// # Errors
/// The first failure of a step.
pub fn run<F, B>(
    order: &Order,
    mut forward: F,
    mut backward: B,
    cx: &mut F::Cx,
) -> Result<(F::Out, B::Out), F::Error>
where
    F: Task,
    B: Task<Cx = F::Cx, Error = F::Error>,
{
    for &step in order.steps() {
        match step.node().phase {
            Phase::Forward => forward.step(step, cx)?,
            Phase::InputGradient | Phase::WeightGradient => backward.step(step, cx)?,
        }
    }
    Ok((forward.finish(cx)?, backward.finish(cx)?))
}
