//! A dispatcher chosen at run time.

use std::fmt;
use std::str::FromStr;

use crate::all_gather::{AllGather, AllGatherState};
use crate::all_to_all::{AllToAll, AllToAllState};
use crate::dispatcher::{DispatchState, Dispatcher, FlightOf};
use crate::fabric::{Arrived, Fabric};
use crate::{Error, Routing};

/// The names of the dispatchers, for configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum DispatcherKind {
    /// `"all-to-all"`: [`AllToAll`].
    #[default]
    AllToAll,
    /// `"all-gather"`: [`AllGather`].
    AllGather,
}

impl DispatcherKind {
    /// All of them.
    pub const ALL: [DispatcherKind; 2] = [DispatcherKind::AllToAll, DispatcherKind::AllGather];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            DispatcherKind::AllToAll => "all-to-all",
            DispatcherKind::AllGather => "all-gather",
        }
    }
}

impl fmt::Display for DispatcherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DispatcherKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let named = DispatcherKind::ALL.into_iter().find(|kind| kind.name() == name);
        named.ok_or_else(|| Error::UnknownDispatcher { name: name.to_owned() })
    }
}

/// A dispatcher chosen by name.
///
/// ```
/// use moe_dispatch::{DispatcherKind, TokenDispatcher};
///
/// let kind: DispatcherKind = "all-to-all".parse()?;
/// let dispatcher = TokenDispatcher { kind, num_experts: 8 };
/// # let _ = dispatcher;
/// # Ok::<(), moe_dispatch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenDispatcher {
    /// Which one.
    pub kind: DispatcherKind,
    /// Experts of the layer.
    pub num_experts: usize,
}

/// What a [`TokenDispatcher`] keeps of a routing.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenDispatcherState<I> {
    /// Planned by [`AllToAll`].
    AllToAll(AllToAllState<I>),
    /// Planned by [`AllGather`].
    AllGather(AllGatherState<I>),
}

impl<I> DispatchState<I> for TokenDispatcherState<I> {
    fn rows(&self) -> usize {
        match self {
            TokenDispatcherState::AllToAll(state) => state.rows(),
            TokenDispatcherState::AllGather(state) => state.rows(),
        }
    }

    fn offsets(&self) -> &I {
        match self {
            TokenDispatcherState::AllToAll(state) => state.offsets(),
            TokenDispatcherState::AllGather(state) => state.offsets(),
        }
    }

    fn overflowed(&self) -> bool {
        match self {
            TokenDispatcherState::AllToAll(state) => state.overflowed(),
            TokenDispatcherState::AllGather(state) => state.overflowed(),
        }
    }
}

impl TokenDispatcher {
    const fn all_to_all(&self) -> AllToAll {
        AllToAll { num_experts: self.num_experts }
    }

    const fn all_gather(&self) -> AllGather {
        AllGather { num_experts: self.num_experts }
    }
}

/// `kind` decides in [`plan`](Dispatcher::plan); from there on the state knows.
impl<F: Fabric> Dispatcher<F> for TokenDispatcher {
    type State = TokenDispatcherState<F::Index>;

    fn plan(&self, fabric: &F, routing: &Routing<F::Index, F::Weights>) -> Result<Self::State, F::Error> {
        Ok(match self.kind {
            DispatcherKind::AllToAll => {
                TokenDispatcherState::AllToAll(self.all_to_all().plan(fabric, routing)?)
            }
            DispatcherKind::AllGather => {
                TokenDispatcherState::AllGather(self.all_gather().plan(fabric, routing)?)
            }
        })
    }

    fn to_experts_start(
        &self,
        fabric: &F,
        x: &F::Tensor,
        weights: Option<&F::Weights>,
        state: &Self::State,
    ) -> Result<FlightOf<F>, F::Error> {
        match state {
            TokenDispatcherState::AllToAll(state) => {
                self.all_to_all().to_experts_start(fabric, x, weights, state)
            }
            TokenDispatcherState::AllGather(state) => {
                self.all_gather().to_experts_start(fabric, x, weights, state)
            }
        }
    }

    fn to_experts_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        match state {
            TokenDispatcherState::AllToAll(state) => {
                self.all_to_all().to_experts_finish(fabric, flight, state)
            }
            TokenDispatcherState::AllGather(state) => {
                self.all_gather().to_experts_finish(fabric, flight, state)
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
        match state {
            TokenDispatcherState::AllToAll(state) => {
                self.all_to_all().to_tokens_start(fabric, y, weights, state)
            }
            TokenDispatcherState::AllGather(state) => {
                self.all_gather().to_tokens_start(fabric, y, weights, state)
            }
        }
    }

    fn to_tokens_finish(
        &self,
        fabric: &F,
        flight: FlightOf<F>,
        state: &Self::State,
    ) -> Result<Arrived<F>, F::Error> {
        match state {
            TokenDispatcherState::AllToAll(state) => {
                self.all_to_all().to_tokens_finish(fabric, flight, state)
            }
            TokenDispatcherState::AllGather(state) => {
                self.all_gather().to_tokens_finish(fabric, flight, state)
            }
        }
    }
}
