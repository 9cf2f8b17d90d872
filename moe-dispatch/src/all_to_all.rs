//! Dispatch by all-to-all over EP and all-gather over ETP.

use crate::dispatcher::{DispatchState, Dispatcher, Flight, FlightOf};
use crate::fabric::{Arrived, Fabric, Over, Transfer};
use crate::plan::{ChunkOrder, Splits};
use crate::sources::Sources;
use crate::{Routing, Sorted};

/// Sends every row only where its expert is: rows are sorted by expert, travel by all-to-all over EP, are gathered
/// over ETP (each of whose ranks holds a slice of the expert), and sorted by local expert. Rows to tokens go the
/// mirror image, with a reduce-scatter over ETP for the gather.
///
/// The rows of an expert stand in the order (ETP rank, EP rank, token) of their source.
///
/// # What moves between start and finish
///
/// Where EP or ETP is 1, all that moves. Where both are larger, the all-to-all over EP alone: rows to experts are gathered over ETP in
/// `to_experts_finish`, when they have come, and rows to tokens are summed over ETP in `to_tokens_start`, before they go, and
/// both calls wait for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllToAll {
    /// Experts of the layer.
    pub num_experts: usize,
}

/// What [`AllToAll`] keeps of a routing.
#[derive(Debug, Clone, PartialEq)]
pub struct AllToAllState<I> {
    top_k: usize,
    sorted: Sorted<I>,
    rows: usize,
    /// Absent in a group of one rank.
    exchange: Option<Exchange<I>>,
    overflowed: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Exchange<I> {
    splits: Splits,
    /// Absent if received rows are sorted as they come.
    order: Option<Order<I>>,
    offsets: I,
}

#[derive(Debug, Clone, PartialEq)]
struct Order<I> {
    to_experts: I,
    to_sources: I,
}

impl<I> Exchange<I> {
    fn out(&self) -> Transfer<'_> {
        Transfer::AllToAll { send: &self.splits.send, recv: &self.splits.recv }
    }

    fn back(&self) -> Transfer<'_> {
        Transfer::AllToAll { send: &self.splits.recv, recv: &self.splits.send }
    }

    fn gather(&self) -> Transfer<'_> {
        Transfer::AllGather { over: Over::Etp, rows: &self.splits.gathered }
    }

    fn scatter(&self) -> Transfer<'_> {
        Transfer::ReduceScatter { over: Over::Etp, rows: &self.splits.gathered }
    }
}

/// Moves rows and weights to where an index says.
fn gather<F: Fabric>(
    fabric: &F,
    (x, weights): &Arrived<F>,
    index: &F::Index,
) -> Result<Arrived<F>, F::Error> {
    let weights = weights.as_ref().map(|w| fabric.gather_weights(w, index)).transpose()?;
    Ok((fabric.gather_rows(x, index)?, weights))
}

fn start<F: Fabric>(
    fabric: &F,
    (x, weights): &Arrived<F>,
    transfer: Transfer<'_>,
) -> Result<F::Pending, F::Error> {
    fabric.start(x, weights.as_ref(), 1, transfer)
}

fn land<F: Fabric>(fabric: &F, flight: FlightOf<F>) -> Result<Arrived<F>, F::Error> {
    match flight {
        Flight::Here(arrived) => Ok(arrived),
        Flight::Away(pending) => fabric.wait(pending),
    }
}

impl<I> DispatchState<I> for AllToAllState<I> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn offsets(&self) -> &I {
        self.exchange.as_ref().map_or(&self.sorted.offsets, |exchange| &exchange.offsets)
    }

    fn overflowed(&self) -> bool {
        self.overflowed
    }
}

impl<F: Fabric> Dispatcher<F> for AllToAll {
    type State = AllToAllState<F::Index>;

    fn plan(&self, fabric: &F, routing: &Routing<F::Index, F::Weights>) -> Result<Self::State, F::Error> {
        let (grid, num_experts) = (fabric.grid(), self.num_experts);
        let local = grid.local_experts(num_experts)?;
        let top_k = routing.top_k;
        let Sources { sorted, counts, rows, overflowed, .. } = Sources::plan(fabric, num_experts, routing)?;
        let rows = rows.total(local.len());
        let Some(counts) = counts else {
            return Ok(AllToAllState { top_k, sorted, rows, exchange: None, overflowed });
        };
        let order = ChunkOrder::new(&counts.received_chunks(), local.len(), rows);
        let order = order.map(|order| -> Result<_, F::Error> {
            let to_experts = fabric.index(&order.to_experts)?;
            Ok(Order { to_experts, to_sources: fabric.index(&order.to_sources)? })
        });
        let exchange = Exchange {
            splits: counts.splits(),
            order: order.transpose()?,
            offsets: fabric.index(&counts.offsets())?,
        };
        Ok(AllToAllState { top_k, sorted, rows, exchange: Some(exchange), overflowed })
    }

    fn to_experts_start(
        &self,
        fabric: &F,
        x: &F::Tensor,
        weights: Option<&F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        let rows = fabric.to_sorted(x, &state.sorted)?;
        let weights = weights.map(|w| fabric.gather_weights(w, &state.sorted.choice)).transpose()?;
        let sorted = (rows, weights);
        let Some(exchange) = &state.exchange else { return Ok(Flight::Here(sorted)) };
        let transfer = if fabric.grid().ep_size() > 1 { exchange.out() } else { exchange.gather() };
        Ok(Flight::Away(start(fabric, &sorted, transfer)?))
    }

    fn to_experts_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        let mut arrived = land(fabric, flight)?;
        let Some(exchange) = &state.exchange else { return Ok(arrived) };
        if fabric.grid().ep_size() > 1 && fabric.grid().etp_size() > 1 {
            arrived = fabric.wait(start(fabric, &arrived, exchange.gather())?)?;
        }
        match &exchange.order {
            Some(order) => gather(fabric, &arrived, &order.to_experts),
            None => Ok(arrived),
        }
    }

    fn to_tokens_start(
        &self,
        fabric: &F,
        y: F::Tensor,
        weights: Option<F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        let Some(exchange) = &state.exchange else { return Ok(Flight::Here((y, weights))) };
        let mut sources = (y, weights);
        if let Some(order) = &exchange.order {
            sources = gather(fabric, &sources, &order.to_sources)?;
        }
        if fabric.grid().etp_size() > 1 {
            let scattered = start(fabric, &sources, exchange.scatter())?;
            if fabric.grid().ep_size() == 1 {
                return Ok(Flight::Away(scattered));
            }
            sources = fabric.wait(scattered)?;
        }
        Ok(Flight::Away(start(fabric, &sources, exchange.back())?))
    }

    fn to_tokens_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        let (rows, weights) = land(fabric, flight)?;
        let position = &state.sorted.position;
        let weights = weights.map(|w| fabric.gather_weights(&w, position)).transpose()?;
        Ok((fabric.gather_sum(&rows, position, state.top_k)?, weights))
    }
}
