//! A decorator that counts calls and bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::decorate::{Decorated, Decoration};
use crate::{Call, RawComm, Result, World};

/// Calls and bytes of one operation of one group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Count {
    /// Calls that the rank made, those that were refused too.
    pub calls: u64,
    /// Bytes that this rank sent, and where it sent nothing, bytes that it received.
    pub bytes: u64,
}

/// Counts by group and operation. Clones share them: a rank's communicators count, its metrics read.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<Mutex<BTreeMap<(GroupKey, &'static str), Count>>>);

impl Counters {
    /// All counts so far.
    pub fn snapshot(&self) -> BTreeMap<(GroupKey, &'static str), Count> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add<D: Device>(&self, call: &Call<D>) {
        let bytes = match (&call.send, &call.recv) {
            (Some((_, sent)), _) => sent.len(),
            (None, Some(recv)) => D::byte_len(recv),
            (None, None) => 0,
        };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry((call.group, call.op.name())).or_default();
        count.calls += 1;
        count.bytes += bytes as u64;
    }
}

/// A world whose communicators count.
#[derive(Debug)]
pub struct Counted<W> {
    world: W,
    counters: Counters,
}

impl<W> Counted<W> {
    /// Counts into `counters` what the communicators of `world` start.
    pub fn new(world: W, counters: Counters) -> Self {
        Counted { world, counters }
    }
}

impl<D: Device, W: World<D>> World<D> for Counted<W> {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn size(&self) -> usize {
        self.world.size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>> {
        let inner = self.world.communicator(key, ranks)?;
        Ok(Box::new(Decorated { inner, decoration: self.counters.clone() }))
    }
}

impl<D: Device> Decoration<D> for Counters {
    type Started = ();

    fn before(&self, call: &Call<D>) -> Result<()> {
        self.add(call);
        Ok(())
    }
}
