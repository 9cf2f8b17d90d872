//! A decorator that makes a rank fail, for tests of what the others do then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::decorate::{Decorated, Decoration};
use crate::{Call, Error, RawComm, Result, World};

/// What a rank does when it is to start a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It returns [`Error::Injected`] instead.
    Fail,
    /// It panics instead.
    Panic,
    /// It never goes on.
    Hang,
    /// It starts the call later.
    Delay(Duration),
}

/// One call of a rank that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What happens.
    pub fate: Fate,
    /// The only operation that counts ([`Collective::name`](crate::Collective::name)), if not all.
    pub op: Option<&'static str>,
    /// The only group that counts, if not all.
    pub group: Option<GroupKey>,
    /// Which of the calls that count, from 0.
    pub call: u64,
}

/// A world in which some calls of this rank go wrong.
#[derive(Debug)]
pub struct Faulty<W> {
    world: W,
    faults: Arc<[Armed]>,
}

#[derive(Debug)]
struct Armed {
    fault: Fault,
    seen: AtomicU64,
}

impl<W> Faulty<W> {
    /// Plans faults for this rank; none for an ordinary one.
    pub fn new(world: W, faults: impl IntoIterator<Item = Fault>) -> Self {
        let armed = |fault| Armed { fault, seen: AtomicU64::new(0) };
        Faulty { world, faults: faults.into_iter().map(armed).collect() }
    }
}

impl<D: Device, W: World<D>> World<D> for Faulty<W> {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn size(&self) -> usize {
        self.world.size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>> {
        let inner = self.world.communicator(key, ranks)?;
        Ok(Box::new(Decorated { inner, decoration: self.faults.clone() }))
    }
}

impl<D: Device> Decoration<D> for Arc<[Armed]> {
    type Started = ();

    fn before(&self, call: &Call<D>) -> Result<()> {
        let (group, op) = (call.group, call.op.name());
        for Armed { fault, seen } in &**self {
            let counts =
                fault.op.is_none_or(|only| only == op) && fault.group.is_none_or(|only| only == group);
            if !counts || seen.fetch_add(1, Ordering::Relaxed) != fault.call {
                continue;
            }
            match fault.fate {
                Fate::Fail => return Err(Error::Injected { group, op }),
                Fate::Panic => panic!("injected fault at {op} of {group}"),
                Fate::Hang => loop {
                    thread::park();
                },
                Fate::Delay(time) => thread::sleep(time),
            }
        }
        Ok(())
    }
}
