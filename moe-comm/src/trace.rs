//! A decorator that records in which order a rank starts and awaits operations.

use std::sync::{Arc, Mutex, PoisonError};

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::decorate::{Decorated, Decoration};
use crate::{Call, Flight, RawComm, Result, World};

/// What a rank did with an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It called it: it started, or was refused.
    Start,
    /// It began to wait for it.
    Wait,
}

/// One line of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// What happened.
    pub moment: Moment,
    /// The operation ([`Collective::name`](crate::Collective::name)).
    pub op: &'static str,
    /// The group.
    pub group: GroupKey,
    /// Which of the operations that this rank started, from 0: the same at start and wait.
    pub number: u64,
}

/// The events of a rank, in order. Clones share them: a rank's communicators record, its owner reads.
#[derive(Debug, Clone, Default)]
pub struct Trace(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    started: u64,
    events: Vec<Event>,
}

impl Trace {
    /// What happened since the last call.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner).events)
    }

    fn start(&self, op: &'static str, group: GroupKey) -> Event {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let event = Event { moment: Moment::Start, op, group, number: log.started };
        log.started += 1;
        log.events.push(event);
        event
    }

    fn wait(&self, started: Event) {
        let event = Event { moment: Moment::Wait, ..started };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).events.push(event);
    }
}

/// A world whose communicators record.
#[derive(Debug)]
pub struct Traced<W> {
    world: W,
    trace: Trace,
}

impl<W> Traced<W> {
    /// Records in `trace` what the communicators of `world` start and await.
    pub fn new(world: W, trace: Trace) -> Self {
        Traced { world, trace }
    }
}

impl<D: Device, W: World<D>> World<D> for Traced<W> {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn size(&self) -> usize {
        self.world.size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>> {
        let inner = self.world.communicator(key, ranks)?;
        Ok(Box::new(Decorated { inner, decoration: self.trace.clone() }))
    }
}

impl<D: Device> Decoration<D> for Trace {
    type Started = Event;

    fn before(&self, call: &Call<D>) -> Result<Event> {
        Ok(self.start(call.op.name(), call.group))
    }

    fn in_flight(&self, event: Event, inner: Box<dyn Flight<D>>) -> Box<dyn Flight<D>> {
        Box::new(TracedFlight { inner, event, trace: self.clone() })
    }
}

struct TracedFlight<D: Device> {
    inner: Box<dyn Flight<D>>,
    event: Event,
    trace: Trace,
}

impl<D: Device> Flight<D> for TracedFlight<D> {
    fn ready(&self) -> Result<bool> {
        self.inner.ready()
    }

    fn wait(self: Box<Self>) -> Result<Option<D::Buf>> {
        self.trace.wait(self.event);
        self.inner.wait()
    }
}
