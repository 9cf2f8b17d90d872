//! What decorators share: a communicator that does something about each call and leaves the rest to another.

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::{Call, Flight, RawComm, Result};

/// What a decorator does.
pub(crate) trait Decoration<D: Device>: Send {
    /// What it knows of a call in flight.
    type Started;

    /// Before a call starts; on an error it does not.
    fn before(&self, call: &Call<D>) -> Result<Self::Started>;

    /// What is returned for the call in flight.
    fn in_flight(&self, _started: Self::Started, flight: Box<dyn Flight<D>>) -> Box<dyn Flight<D>> {
        flight
    }
}

pub(crate) struct Decorated<D: Device, T> {
    pub inner: Box<dyn RawComm<D>>,
    pub decoration: T,
}

impl<D: Device, T: Decoration<D>> RawComm<D> for Decorated<D, T> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn ranks(&self) -> &[usize] {
        self.inner.ranks()
    }

    fn key(&self) -> GroupKey {
        self.inner.key()
    }

    fn start(&self, call: Call<D>) -> Result<Box<dyn Flight<D>>> {
        let started = self.decoration.before(&call)?;
        Ok(self.decoration.in_flight(started, self.inner.start(call)?))
    }

    fn start_batch(&self, calls: Vec<Call<D>>) -> Result<Vec<Box<dyn Flight<D>>>> {
        let started = calls.iter().map(|call| self.decoration.before(call)).collect::<Result<Vec<_>>>()?;
        let flights = self.inner.start_batch(calls)?;
        Ok(started
            .into_iter()
            .zip(flights)
            .map(|(started, flight)| self.decoration.in_flight(started, flight))
            .collect())
    }

    fn abort(&self, why: &str) {
        self.inner.abort(why);
    }
}
