//! Dispatch by all-gather over EP×ETP.

use crate::dispatcher::{DispatchState, Dispatcher, Flight, FlightOf};
use crate::fabric::{Arrived, Fabric, Over, Transfer};
use crate::sources::Sources;
use crate::{Routing, Sorted};

/// Gathers all tokens on all ranks, where each rank takes those its experts are chosen by; results return by one
/// reduce-scatter. Moves more bytes than [`AllToAll`](crate::AllToAll) unless a token's choices cover most ranks,
/// in fewer and regular messages: for few ranks, large `top_k`, or networks that dislike all-to-all.
///
/// The rows of an expert stand in the order (position in the EP×ETP group, token) of their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllGather {
    /// Experts of the layer.
    pub num_experts: usize,
}

/// What [`AllGather`] keeps of a routing.
#[derive(Debug, Clone, PartialEq)]
pub struct AllGatherState<I> {
    top_k: usize,
    /// The choices of all gathered tokens, sorted by local expert.
    sorted: Sorted<I>,
    rows: usize,
    /// Tokens of each rank; absent in a group of one rank.
    tokens: Option<Vec<usize>>,
    overflowed: bool,
}

impl<I> DispatchState<I> for AllGatherState<I> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn offsets(&self) -> &I {
        &self.sorted.offsets
    }

    fn overflowed(&self) -> bool {
        self.overflowed
    }
}

impl<F: Fabric> Dispatcher<F> for AllGather {
    type State = AllGatherState<F::Index>;

    fn plan(&self, fabric: &F, routing: &Routing<F::Index, F::Weights>) -> Result<Self::State, F::Error> {
        let (grid, num_experts) = (fabric.grid(), self.num_experts);
        let local = grid.local_experts(num_experts)?;
        let top_k = routing.top_k;
        let Sources { experts, sorted, counts, rows: sorted_rows, overflowed } =
            Sources::plan(fabric, num_experts, routing)?;
        let rows = sorted_rows.total(local.len());
        let Some(counts) = counts else {
            return Ok(AllGatherState { top_k, sorted, rows, tokens: None, overflowed });
        };
        let choices: Vec<usize> = counts.tokens().iter().map(|tokens| tokens * top_k).collect();
        let experts = fabric.all_gather_index(&experts, &choices)?;
        let sorted = fabric.sort_by_expert(&experts, top_k, num_experts, local, sorted_rows)?;
        Ok(AllGatherState { top_k, sorted, rows, tokens: Some(counts.tokens().to_vec()), overflowed })
    }

    fn to_experts_start(
        &self,
        fabric: &F,
        x: &F::Tensor,
        weights: Option<&F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        match &state.tokens {
            Some(tokens) => {
                let transfer = Transfer::AllGather { over: Over::EpEtp, rows: tokens };
                Ok(Flight::Away(fabric.start(x, weights, state.top_k, transfer)?))
            }
            None => Ok(Flight::Here(to_rows(fabric, x, weights, &state.sorted)?)),
        }
    }

    fn to_experts_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        match flight {
            Flight::Here(rows) => Ok(rows),
            Flight::Away(pending) => {
                let (x, weights) = fabric.wait(pending)?;
                to_rows(fabric, &x, weights.as_ref(), &state.sorted)
            }
        }
    }

    fn to_tokens_start(
        &self,
        fabric: &F,
        y: F::Tensor,
        weights: Option<F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        let position = &state.sorted.position;
        let sums = fabric.gather_sum(&y, position, state.top_k)?;
        let weights = weights.map(|w| fabric.gather_weights(&w, position)).transpose()?;
        match &state.tokens {
            Some(tokens) => {
                let transfer = Transfer::ReduceScatter { over: Over::EpEtp, rows: tokens };
                Ok(Flight::Away(fabric.start(&sums, weights.as_ref(), state.top_k, transfer)?))
            }
            None => Ok(Flight::Here((sums, weights))),
        }
    }

    fn to_tokens_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        _state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        match flight {
            Flight::Here(arrived) => Ok(arrived),
            Flight::Away(pending) => fabric.wait(pending),
        }
    }
}

/// The rows of the sorted choices.
fn to_rows<F: Fabric>(
    fabric: &F,
    x: &F::Tensor,
    weights: Option<&F::Weights>,
    sorted: &Sorted<F::Index>,
) -> Result<Arrived<F>, F::Error> {
    let weights = weights.map(|w| fabric.gather_weights(w, &sorted.choice)).transpose()?;
    Ok((fabric.to_sorted(x, sorted)?, weights))
}
