//! The trait of all dispatchers.

use crate::fabric::{Arrived, Fabric};
use crate::{Batch, Error, Routing};

/// Rows under way between tokens and experts. Owned by the caller, so that any number are in flight; it borrows
/// nothing from the fabric unless the fabric's own [`Fabric::Pending`] does.
#[derive(Debug)]
pub enum Flight<X, W, P> {
    /// Nothing had to be moved between ranks.
    Here((X, Option<W>)),
    /// A transfer is under way.
    Away(P),
}

/// The [`Flight`] of a fabric.
pub type FlightOf<F> = Flight<<F as Fabric>::Tensor, <F as Fabric>::Weights, <F as Fabric>::Pending>;

/// The [`Batch`] of a fabric.
pub type BatchOf<F> = Batch<<F as Fabric>::Tensor, <F as Fabric>::Weights, <F as Fabric>::Index>;

/// What a dispatcher keeps of a routing, from the forward to the backward pass.
pub trait DispatchState<I> {
    /// Rows that this rank's experts receive.
    fn rows(&self) -> usize;

    /// First row of each local expert, and the end of the last one.
    fn offsets(&self) -> &I;

    /// Whether more rows were chosen than a budget allows ([`Shapes::PerRank`](crate::Shapes::PerRank)), so that none was
    /// routed; the same on all ranks of the group.
    fn overflowed(&self) -> bool;
}

/// Brings tokens to their experts and results back, forward and backward.
///
/// Every movement is two calls, `…_start` and `…_finish`, between which a schedule may put other work; what moves meanwhile,
/// [`AllToAll`](crate::AllToAll#what-moves-between-start-and-finish) says of itself. Everything that a call needs to know about its micro-batch is in its [`State`](Dispatcher::State), which the caller keeps
/// from the forward to the backward pass. All ranks of the EP×ETP group make the same calls in the same order.
///
/// There are only two movements: rows *to experts* (dispatch, and the gradient of combine) and rows *to tokens*
/// (combine, and the gradient of dispatch). An implementation says how to plan and to move; the passes and their
/// blocking forms are provided. Every call returns the fabric's errors; a `…_finish` that is handed the flight of
/// another pass returns [`Error::Flight`] if it misses the weights.
///
/// | pass | moves | weights beside the rows |
/// |---|---|---|
/// | dispatch | to experts | probabilities |
/// | combine | to tokens (sum over the choices and the ETP slices) | |
/// | combine backward | to experts | |
/// | dispatch backward | to tokens (same sums) | gradients of the probabilities |
pub trait Dispatcher<F: Fabric> {
    /// What is kept of a routing: indices and counts, generic over the index and not over the fabric.
    type State: DispatchState<F::Index>;

    /// Sorts the choices and exchanges counts: the one time per layer and micro-batch that the host waits for the
    /// device. A group of one rank exchanges nothing and waits for nothing, nor does any with
    /// [`Shapes::PerExpert`](crate::Shapes::PerExpert).
    ///
    /// # Errors
    /// [`Error::Experts`] if EP does not divide the experts; [`Error::Routing`] if the routing has not `top_k` choices for
    /// each of its tokens; the fabric's errors, among them that an expert has more
    /// choices than it may have.
    fn plan(&self, fabric: &F, routing: &Routing<F::Index, F::Weights>) -> Result<Self::State, F::Error>;

    /// Starts to move the tokens' rows `x: [tokens, hidden]` to the experts that chose them, with the weights of the
    /// choices (`[tokens · top_k]`) if given.
    fn to_experts_start(
        &self,
        fabric: &F,
        x: &F::Tensor,
        weights: Option<&F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error>;

    /// Rows `[rows, hidden]` grouped by local expert, with a weight per row if weights were sent.
    fn to_experts_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error>;

    /// Starts to move the experts' rows `y: [rows, hidden]`, partial sums over ETP, to their tokens, with a weight
    /// per row if given.
    fn to_tokens_start(
        &self,
        fabric: &F,
        y: F::Tensor,
        weights: Option<F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error>;

    /// The sum over the choices of each token, `[tokens, hidden]`, and the weights in the order of the choices
    /// (`[tokens · top_k]`), summed over ETP; both 0 where a choice was routed nowhere.
    fn to_tokens_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error>;

    /// Starts dispatch: plans, and sends `x: [tokens, hidden]` and the probabilities.
    fn dispatch_start(
        &self,
        fabric: &F,
        x: &F::Tensor,
        routing: &Routing<F::Index, F::Weights>,
    ) -> Result<(FlightOf<F>, Self::State), F::Error> {
        let state = self.plan(fabric, routing)?;
        let flight = self.to_experts_start(fabric, x, Some(&routing.weights), &state)?;
        Ok((flight, state))
    }

    /// Ends dispatch: the rows of this rank's experts.
    fn dispatch_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<BatchOf<F>, F::Error> {
        let (x, probs) = self.to_experts_finish(fabric, flight, state)?;
        let probs = probs.ok_or(Error::Flight { call: "dispatch_finish", missing: "probabilities" })?;
        Ok(Batch { x, probs, offsets: state.offsets().clone(), rows: state.rows() })
    }

    /// Starts combine: sends the experts' outputs `y: [rows, hidden]`.
    fn combine_start(&self, fabric: &F, y: F::Tensor, state: &Self::State) -> Result<FlightOf<F>, F::Error> {
        self.to_tokens_start(fabric, y, None, state)
    }

    /// Ends combine: `[tokens, hidden]`.
    fn combine_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<F::Tensor, F::Error> {
        Ok(self.to_tokens_finish(fabric, flight, state)?.0)
    }

    /// Starts the gradient of combine: sends `dy: [tokens, hidden]`.
    fn combine_backward_start(
        &self,
        fabric: &F,
        dy: &F::Tensor,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        self.to_experts_start(fabric, dy, None, state)
    }

    /// Ends the gradient of combine: that of the experts' outputs, `[rows, hidden]`.
    fn combine_backward_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<F::Tensor, F::Error> {
        Ok(self.to_experts_finish(fabric, flight, state)?.0)
    }

    /// Starts the gradient of dispatch: sends those of the experts' inputs, `dx: [rows, hidden]` and
    /// `dprobs: [rows]`, both partial over ETP.
    fn dispatch_backward_start(
        &self,
        fabric: &F,
        dx: F::Tensor,
        dprobs: F::Weights,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        self.to_tokens_start(fabric, dx, Some(dprobs), state)
    }

    /// Ends the gradient of dispatch: that of the tokens, `[tokens, hidden]`, and that of the router's weights,
    /// `[tokens · top_k]`.
    fn dispatch_backward_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<(F::Tensor, F::Weights), F::Error> {
        let (dx, dweights) = self.to_tokens_finish(fabric, flight, state)?;
        let missing = "gradients of the probabilities";
        Ok((dx, dweights.ok_or(Error::Flight { call: "dispatch_backward_finish", missing })?))
    }

    /// Dispatch, start to finish.
    fn dispatch(
        &self,
        fabric: &F,
        x: &F::Tensor,
        routing: &Routing<F::Index, F::Weights>,
    ) -> Result<(BatchOf<F>, Self::State), F::Error> {
        let (flight, state) = self.dispatch_start(fabric, x, routing)?;
        Ok((self.dispatch_finish(fabric, flight, &state)?, state))
    }

    /// Combine, start to finish.
    fn combine(&self, fabric: &F, y: F::Tensor, state: &Self::State) -> Result<F::Tensor, F::Error> {
        self.combine_finish(fabric, self.combine_start(fabric, y, state)?, state)
    }

    /// The gradient of combine, start to finish.
    fn combine_backward(
        &self,
        fabric: &F,
        dy: &F::Tensor,
        state: &Self::State,
    ) -> Result<F::Tensor, F::Error> {
        self.combine_backward_finish(fabric, self.combine_backward_start(fabric, dy, state)?, state)
    }

    /// The gradient of dispatch, start to finish.
    fn dispatch_backward(
        &self,
        fabric: &F,
        dx: F::Tensor,
        dprobs: F::Weights,
        state: &Self::State,
    ) -> Result<(F::Tensor, F::Weights), F::Error> {
        self.dispatch_backward_finish(fabric, self.dispatch_backward_start(fabric, dx, dprobs, state)?, state)
    }
}
