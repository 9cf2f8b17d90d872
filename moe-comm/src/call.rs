//! One operation of a group, as data.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use moe_kernels::{DType, Device};

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// The sum, added in ascending rank of the group.
    Sum,
    /// The largest.
    Max,
}

/// What a group does together. Counts are elements; indices are positions in the group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Collective {
    /// Every rank receives the reduction of all that was sent.
    AllReduce(Reduction),
    /// Every rank receives what all sent, in rank order; rank `i` sends `counts[i]`.
    AllGather {
        /// Elements of each rank.
        counts: Arc<[usize]>,
    },
    /// Rank `i` receives the reduction of the `i`-th block; blocks have `counts[i]` elements.
    ReduceScatter {
        /// How the blocks are reduced.
        reduction: Reduction,
        /// Elements of each block.
        counts: Arc<[usize]>,
    },
    /// Every rank sends block `j` to rank `j` and receives the blocks meant for it, in rank order.
    AllToAll {
        /// Elements sent to each rank.
        send: Arc<[usize]>,
        /// Elements received from each rank.
        recv: Arc<[usize]>,
    },
    /// Every rank receives what `root` sent.
    Broadcast {
        /// The rank that sends.
        root: usize,
        /// Elements.
        count: usize,
    },
    /// Nobody leaves before all have entered.
    Barrier,
    /// A message to one rank; pairs with its [`Collective::Recv`] in order, and the tags must agree.
    Send {
        /// The rank that receives.
        to: usize,
        /// What the message is.
        tag: u64,
    },
    /// A message from one rank.
    Recv {
        /// The rank that sends.
        from: usize,
        /// What the message is.
        tag: u64,
        /// Elements.
        count: usize,
    },
}

impl Collective {
    /// Lower-case name (`"all_reduce"`), for reports and counters.
    pub const fn name(&self) -> &'static str {
        match self {
            Collective::AllReduce(_) => "all_reduce",
            Collective::AllGather { .. } => "all_gather",
            Collective::ReduceScatter { .. } => "reduce_scatter",
            Collective::AllToAll { .. } => "all_to_all",
            Collective::Broadcast { .. } => "broadcast",
            Collective::Barrier => "barrier",
            Collective::Send { .. } => "send",
            Collective::Recv { .. } => "recv",
        }
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An operation with its buffers, which it owns while it is in flight: what is sent is shared and must not change,
/// a receive buffer moves in and comes back from [`Flight::wait`](crate::Flight::wait).
#[derive(Debug)]
pub struct Call<D: Device> {
    /// The operation.
    pub op: Collective,
    /// Type of the elements.
    pub dtype: DType,
    /// What this rank sends: a buffer and the byte range in it.
    pub send: Option<(Arc<D::Buf>, Range<usize>)>,
    /// Where this rank receives; exactly as long as what arrives.
    pub recv: Option<D::Buf>,
}
