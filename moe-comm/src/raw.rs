//! What a backend implements.

use moe_kernels::Device;
use moe_topology::GroupKey;

use crate::{Call, Error, Result};

/// A communicator of one group, as one of its ranks sees it.
///
/// `Send` but not `Sync`: the order of calls is the protocol. Every rank of the group makes the same calls in the
/// same order. Decorators (counting, tracing, faults) implement the same trait.
///
/// # Errors
/// To start returns what [`Call::check`] does, before the call counts as one, and
/// [`Error::Poisoned`](crate::Error::Poisoned) when the world has failed, or fails now since calls do not agree.
pub trait RawComm<D: Device>: Send {
    /// This rank's position in the group.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn size(&self) -> usize;
    /// The world ranks of the group, in group order.
    fn ranks(&self) -> &[usize];
    /// What the group is, or the first of those that share this communicator; calls say which they are of.
    fn key(&self) -> GroupKey;
    /// Starts an operation. It makes progress without further calls of this rank.
    fn start(&self, call: Call<D>) -> Result<Box<dyn Flight<D>>>;
    /// Starts several at once (one NCCL group); the order inside a batch is free of deadlock. If one of them does not
    /// pass [`Call::check`], none is started.
    fn start_batch(&self, calls: Vec<Call<D>>) -> Result<Vec<Box<dyn Flight<D>>>>;
    /// Ends all operations of the whole world with an error that carries `why`: those in flight, also if they are done
    /// and not yet awaited, and all later ones.
    fn abort(&self, why: &str);
}

/// An operation in flight.
pub trait Flight<D: Device>: Send {
    /// Whether it is done. It makes progress, without waiting.
    fn ready(&self) -> Result<bool>;
    /// Orders the device's further work behind it (on a stream), or waits for it (on a CPU), and returns the receive
    /// buffer: there is one if the call had one.
    ///
    /// # Errors
    /// [`Error::Poisoned`](crate::Error::Poisoned) names the rank, the group and the operation that failed.
    fn wait(self: Box<Self>) -> Result<Option<D::Buf>>;
}

/// Where one rank gets its communicators.
pub trait World<D: Device>: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks of the world.
    fn size(&self) -> usize;
    /// Makes the communicator of a group that this rank belongs to. Collective: every rank of the group makes the
    /// same calls in the same order. `ranks` are world ranks in group order.
    ///
    /// # Errors
    /// [`Error::BadGroup`](crate::Error::BadGroup) if a rank is not in the world, twice in `ranks`, or if this rank is
    /// not among them.
    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>>;
}

/// Where `rank` of a world of `size` stands in the group of `ranks`.
///
/// # Errors
/// As [`World::communicator`].
pub(crate) fn position(key: GroupKey, ranks: &[usize], rank: usize, size: usize) -> Result<usize> {
    let refuse = |why| Err(Error::BadGroup { group: key, ranks: ranks.to_vec(), why });
    let mut sorted = ranks.to_vec();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return refuse("a rank is named twice");
    }
    if sorted.last().is_some_and(|&last| last >= size) {
        return refuse("a rank is outside of the world");
    }
    ranks.iter().position(|&member| member == rank).map_or_else(|| refuse("this rank is not among them"), Ok)
}

impl<D: Device, W: World<D> + ?Sized> World<D> for Box<W> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<D>>> {
        (**self).communicator(key, ranks)
    }
}
