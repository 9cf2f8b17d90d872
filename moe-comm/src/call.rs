//! One operation of a group, as data.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use moe_kernels::{DType, Device};
use moe_topology::GroupKey;

use crate::{Error, Result};

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// The sum; of integers, modulo their range. The order of additions depends on the group and the shape alone (on
    /// threads it is ascending rank), so that the same call gives the same bits.
    Sum,
    /// The largest; not a number if any value is not a number.
    Max,
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reduction::Sum => "sum",
            Reduction::Max => "max",
        })
    }
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

/// The operation and what it moves, as reports show it: `all_gather of [3, 0, 2]`.
impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Collective::AllReduce(reduction) => write!(f, " ({reduction})"),
            Collective::AllGather { counts } => write!(f, " of {counts:?}"),
            Collective::ReduceScatter { reduction, counts } => write!(f, " ({reduction}) of {counts:?}"),
            Collective::AllToAll { send, recv } => write!(f, " sending {send:?} and receiving {recv:?}"),
            Collective::Broadcast { root, count } => write!(f, " of {count} from {root}"),
            Collective::Barrier => Ok(()),
            Collective::Send { to, tag } => write!(f, " to {to} with tag {tag}"),
            Collective::Recv { from, tag, count } => write!(f, " of {count} from {from} with tag {tag}"),
        }
    }
}

/// An operation with its buffers, which it owns while it is in flight: what is sent is shared and must not change,
/// a receive buffer moves in and comes back from [`Flight::wait`](crate::Flight::wait).
#[derive(Debug)]
pub struct Call<D: Device> {
    /// Which group calls: groups of the same ranks share a communicator.
    pub group: GroupKey,
    /// The operation.
    pub op: Collective,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements of one row: no part of the operation, but ranks that agree on counts and not on shapes are told so.
    pub cols: usize,
    /// What this rank sends: a buffer and the byte range in it.
    pub send: Option<(Arc<D::Buf>, Range<usize>)>,
    /// Where this rank receives; exactly as long as what arrives. In a group of one, and at the root of a broadcast,
    /// it may be absent: what would arrive is what was sent.
    pub recv: Option<D::Buf>,
}

impl<D: Device> Call<D> {
    /// Elements that this rank sends.
    pub fn elements(&self) -> usize {
        self.send.as_ref().map_or(0, |(_, bytes)| bytes.len() / self.dtype.size())
    }

    /// What the other ranks have to agree with.
    pub fn signature(&self) -> Signature {
        Signature {
            group: self.group,
            op: self.op.clone(),
            dtype: self.dtype,
            elements: self.elements(),
            cols: self.cols,
        }
    }

    /// Checks what `rank` of a group of `size` can check alone: that peers exist, that counts are complete, that
    /// buffers are there and as long as the counts say.
    ///
    /// # Errors
    /// [`Error::Argument`] says what is wrong; [`Error::Unsupported`] of a reduction of 16-bit integers, which no
    /// backend has.
    pub fn check(&self, rank: usize, size: usize) -> Result<()> {
        let complete = |what: &str, counts: &[usize]| {
            self.require(counts.len() == size, || {
                format!("{what} has {} counts for a group of {size}", counts.len())
            })
        };
        let member = |what: &str, peer: usize| {
            self.require(peer < size, || format!("{what} {peer} is not a rank of a group of {size}"))
        };
        let alone = size == 1;
        match &self.op {
            Collective::AllReduce(_) => {
                self.check_reduced()?;
                self.check_send(None)?;
                self.check_recv(self.elements(), alone)
            }
            Collective::AllGather { counts } => {
                complete("`counts`", counts)?;
                self.check_send(Some(counts[rank]))?;
                self.check_recv(sum(self.op.name(), counts)?, alone)
            }
            Collective::ReduceScatter { counts, .. } => {
                self.check_reduced()?;
                complete("`counts`", counts)?;
                self.check_send(Some(sum(self.op.name(), counts)?))?;
                self.check_recv(counts[rank], alone)
            }
            Collective::AllToAll { send, recv } => {
                complete("`send`", send)?;
                complete("`recv`", recv)?;
                self.require(send[rank] == recv[rank], || {
                    format!("sends {} to itself and receives {} from itself", send[rank], recv[rank])
                })?;
                self.check_send(Some(sum(self.op.name(), send)?))?;
                self.check_recv(sum(self.op.name(), recv)?, alone)
            }
            Collective::Broadcast { root, count } => {
                member("root", *root)?;
                if *root == rank {
                    self.check_send(Some(*count))?;
                } else {
                    self.require(self.send.is_none(), || "only the root sends".into())?;
                }
                self.check_recv(*count, *root == rank)
            }
            Collective::Barrier => {
                self.require(self.send.is_none() && self.recv.is_none(), || "it moves nothing".into())
            }
            Collective::Send { to, .. } => {
                member("receiver", *to)?;
                self.check_send(None)?;
                self.require(self.recv.is_none(), || "it receives nothing".into())
            }
            Collective::Recv { from, count, .. } => {
                member("sender", *from)?;
                self.require(self.send.is_none(), || "it sends nothing".into())?;
                self.check_recv(*count, false)
            }
        }
    }

    fn check_reduced(&self) -> Result<()> {
        match self.dtype {
            DType::U16 => Err(Error::Unsupported { op: self.op.name(), dtype: self.dtype }),
            _ => Ok(()),
        }
    }

    fn check_send(&self, elements: Option<usize>) -> Result<()> {
        let Some((buf, bytes)) = &self.send else {
            return self.refuse("the send buffer is missing".into());
        };
        let size = self.dtype.size();
        self.require(bytes.start <= bytes.end && bytes.end <= D::byte_len(buf), || {
            format!("bytes {bytes:?} lie outside a send buffer of {} bytes", D::byte_len(buf))
        })?;
        self.require(bytes.start % size == 0 && bytes.len() % size == 0, || {
            format!("bytes {bytes:?} are no whole elements of {}", self.dtype)
        })?;
        match elements {
            Some(n) if n != self.elements() => {
                self.refuse(format!("sends {} elements where the counts say {n}", self.elements()))
            }
            _ => Ok(()),
        }
    }

    fn check_recv(&self, elements: usize, optional: bool) -> Result<()> {
        match &self.recv {
            None if optional => Ok(()),
            None => self.refuse("the receive buffer is missing".into()),
            Some(buf) => {
                self.require(elements.checked_mul(self.dtype.size()) == Some(D::byte_len(buf)), || {
                    let (have, size) = (D::byte_len(buf), self.dtype.size());
                    format!("a receive buffer of {have} bytes for {elements} elements of {size} bytes")
                })
            }
        }
    }

    fn require(&self, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { self.refuse(what()) }
    }

    fn refuse(&self, what: String) -> Result<()> {
        Err(Error::Argument { op: self.op.name(), what })
    }
}

/// The sum of counts that a caller gave.
pub(crate) fn sum(op: &'static str, counts: &[usize]) -> Result<usize> {
    let sum = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
    sum.ok_or_else(|| Error::Argument { op, what: format!("the sum of {counts:?} is too large") })
}

/// The product of counts that a caller gave.
pub(crate) fn product(op: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::Argument { op, what: format!("{a} · {b} is too large") })
}

/// The fingerprint of a call: what the ranks of a group compare before anything moves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Signature {
    /// The group that calls.
    pub group: GroupKey,
    /// The operation with its counts, root, tag and reduction.
    pub op: Collective,
    /// Type of the elements.
    pub dtype: DType,
    /// Elements that the rank sends.
    pub elements: usize,
    /// Elements of one row.
    pub cols: usize,
}

impl Signature {
    /// Whether this call of rank `me` and the `other` one of rank `peer` are two sides of one operation.
    pub fn agrees(&self, me: usize, other: &Signature, peer: usize) -> bool {
        use Collective::*;
        if self.group != other.group || self.dtype != other.dtype || self.cols != other.cols {
            return false;
        }
        match (&self.op, &other.op) {
            (AllReduce(mine), AllReduce(theirs)) => mine == theirs && self.elements == other.elements,
            (AllToAll { send, recv }, AllToAll { send: sends, recv: receives }) => {
                send.get(peer) == receives.get(me) && recv.get(peer) == sends.get(me)
            }
            (Send { tag, .. }, Recv { tag: expected, count, .. }) => {
                tag == expected && self.elements == *count
            }
            (Recv { .. }, Send { .. }) => other.agrees(peer, self, me),
            (Send { .. }, Send { .. }) | (Recv { .. }, Recv { .. }) => false,
            (mine, theirs) => mine == theirs,
        }
    }
}

/// `all_reduce (sum), 6 f64 in rows of 3, of attention tp`.
impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.op.fmt(f)?;
        match self.op {
            Collective::Barrier => return write!(f, " of {}", self.group),
            Collective::AllReduce(_) | Collective::Send { .. } => {
                write!(f, ", {} {} in rows of {}", self.elements, self.dtype, self.cols)?;
            }
            _ => write!(f, ", {} in rows of {}", self.dtype, self.cols)?,
        }
        write!(f, ", of {}", self.group)
    }
}

#[cfg(test)]
mod tests {
    use moe_kernels::Cpu;
    use moe_topology::Attention;

    use super::*;

    #[test]
    fn counts_without_a_sum_are_refused() {
        let counts: Arc<[usize]> = [0, usize::MAX, 1].into();
        let ops = [
            Collective::AllGather { counts: counts.clone() },
            Collective::ReduceScatter { reduction: Reduction::Sum, counts: counts.clone() },
            Collective::AllToAll { send: [0; 3].into(), recv: counts.clone() },
            Collective::AllToAll { send: counts, recv: [0; 3].into() },
        ];
        for op in ops {
            let send = Some((Arc::new(Cpu::new(1).alloc(0).unwrap()), 0..0));
            let recv = Some(Cpu::new(1).alloc(0).unwrap());
            let group = Attention::TP.into();
            let call = Call::<Cpu> { group, op, dtype: DType::F32, cols: 1, send, recv };
            let refused = call.check(0, 3).unwrap_err().to_string();
            assert!(refused.contains("too large"), "{refused}");
        }
    }
}
