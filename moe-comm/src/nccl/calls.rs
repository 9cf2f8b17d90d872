//! Operations as calls of NCCL.

use std::ffi::{c_int, c_void};

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t};
use moe_kernels::DType;

use super::library::{Nccl, Stream};
use crate::{Collective, Error, Reduction, Result};

/// The operands of a call, as one of the ranks of a group has them. What is only moved is moved as bytes, whatever its type.
pub(super) struct Operands {
    pub op: Collective,
    pub dtype: DType,
    /// Bytes that this rank sends.
    pub bytes: usize,
    /// This rank's position in the group.
    pub rank: usize,
    /// Where it lies that this rank sends, and where it receives; 0 where it does not.
    pub send: u64,
    pub recv: u64,
}

/// What a reduction is to NCCL.
fn reduction(op: &'static str, reduction: Reduction, dtype: DType) -> Result<(ncclRedOp_t, ncclDataType_t)> {
    let types = match dtype {
        DType::F64 => ncclDataType_t::ncclFloat64,
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::Bf16 => ncclDataType_t::ncclBfloat16,
        DType::I64 => ncclDataType_t::ncclInt64,
        DType::I32 => ncclDataType_t::ncclInt32,
        DType::U8 => ncclDataType_t::ncclUint8,
        _ => return Err(Error::Unsupported { op, dtype }),
    };
    match reduction {
        Reduction::Sum => Ok((ncclRedOp_t::ncclSum, types)),
        // NCCL's largest of floats is the largest of those that are numbers.
        Reduction::Max if is_float(dtype) => Err(Error::Unsupported { op, dtype }),
        Reduction::Max => Ok((ncclRedOp_t::ncclMax, types)),
    }
}

pub(super) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F64 | DType::F32 | DType::Bf16)
}

/// What NCCL connects ranks for when it comes for the first time: a function on a type, with about as many bytes, or a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Connection {
    Function(&'static str, DType, Option<Reduction>, u32),
    To(usize),
    From(usize),
}

impl Operands {
    /// What the calls need, the same on all ranks of a collective, on both of a pair.
    pub(super) fn connections(&self) -> Vec<Connection> {
        let of = |name, reduction: Option<Reduction>, elements: usize| {
            // What is only moved is bytes.
            let dtype = if reduction.is_some() { self.dtype } else { DType::U8 };
            let class = (elements * self.dtype.size()).checked_ilog2().unwrap_or(0);
            Connection::Function(name, dtype, reduction, class)
        };
        match &self.op {
            Collective::AllReduce(how) => vec![of("all_reduce", Some(*how), self.bytes / self.dtype.size())],
            Collective::AllGather { counts } if equal(counts) => {
                vec![of("all_gather", None, counts.iter().sum())]
            }
            Collective::AllGather { counts } => {
                blocks(counts).map(|(_, _, n)| of("broadcast", None, n)).collect()
            }
            Collective::ReduceScatter { reduction, counts } if equal(counts) => {
                vec![of("reduce_scatter", Some(*reduction), counts.iter().sum())]
            }
            Collective::ReduceScatter { reduction, counts } => {
                blocks(counts).map(|(_, _, n)| of("reduce", Some(*reduction), n)).collect()
            }
            Collective::AllToAll { send, recv } => {
                let to = blocks(send).map(|(rank, _, _)| Connection::To(rank));
                to.chain(blocks(recv).map(|(rank, _, _)| Connection::From(rank))).collect()
            }
            Collective::Broadcast { count, .. } => vec![of("broadcast", None, *count)],
            Collective::Send { .. } | Collective::Recv { .. } | Collective::Barrier => Vec::new(),
        }
    }

    /// Whether NCCL has the operation on the type.
    pub(super) fn check(&self) -> Result<()> {
        match self.op {
            Collective::AllReduce(how) | Collective::ReduceScatter { reduction: how, .. } => {
                reduction(self.op.name(), how, self.dtype).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Makes the calls of a collective, between the start of a group and its end.
    ///
    /// # Safety
    ///
    /// The communicator is alive, the operands lie in memory of its GPU as long as the operation says, and are held until the stream is
    /// behind it.
    pub(super) unsafe fn call(&self, nccl: &Nccl, comm: ncclComm_t, stream: Stream) -> Result<()> {
        const BYTES: ncclDataType_t = ncclDataType_t::ncclUint8;
        let (size, name) = (self.dtype.size(), self.op.name());
        let send = |elements: usize| (self.send + (elements * size) as u64) as *const c_void;
        let recv = |elements: usize| (self.recv + (elements * size) as u64) as *mut c_void;
        // SAFETY: the caller's promise; offsets are sums of counts, which `Call::check` compared with the buffers.
        unsafe {
            match &self.op {
                Collective::AllReduce(how) => {
                    let (how, types) = reduction(name, *how, self.dtype)?;
                    let n = self.bytes / size;
                    nccl.check(name, (nccl.all_reduce)(send(0), recv(0), n, types, how, comm, stream))
                }
                Collective::AllGather { counts } if equal(counts) => {
                    let bytes = self.bytes;
                    nccl.check(name, (nccl.all_gather)(send(0), recv(0), bytes, BYTES, comm, stream))
                }
                Collective::AllGather { counts } => blocks(counts).try_for_each(|(root, at, n)| {
                    let from = if root == self.rank { send(0) } else { recv(at).cast_const() };
                    let root = root as c_int;
                    nccl.check(name, (nccl.broadcast)(from, recv(at), n * size, BYTES, root, comm, stream))
                }),
                Collective::ReduceScatter { reduction: how, counts } if equal(counts) => {
                    let (how, types) = reduction(name, *how, self.dtype)?;
                    let n = counts[self.rank];
                    nccl.check(name, (nccl.reduce_scatter)(send(0), recv(0), n, types, how, comm, stream))
                }
                Collective::ReduceScatter { reduction: how, counts } => {
                    let (how, types) = reduction(name, *how, self.dtype)?;
                    blocks(counts).try_for_each(|(root, at, n)| {
                        let to = if root == self.rank { recv(0) } else { std::ptr::null_mut() };
                        let root = root as c_int;
                        nccl.check(name, (nccl.reduce)(send(at), to, n, types, how, root, comm, stream))
                    })
                }
                Collective::AllToAll { send: sends, recv: receives } => {
                    blocks(sends).try_for_each(|(to, at, n)| {
                        let to = to as c_int;
                        nccl.check(name, (nccl.send)(send(at), n * size, BYTES, to, comm, stream))
                    })?;
                    blocks(receives).try_for_each(|(from, at, n)| {
                        let from = from as c_int;
                        nccl.check(name, (nccl.recv)(recv(at), n * size, BYTES, from, comm, stream))
                    })
                }
                Collective::Broadcast { root, count } => {
                    // The root may have nowhere to receive: then what it sends is in place.
                    let from = if *root == self.rank { send(0) } else { recv(0).cast_const() };
                    let to = if self.recv == 0 { from.cast_mut() } else { recv(0) };
                    let root = *root as c_int;
                    nccl.check(name, (nccl.broadcast)(from, to, count * size, BYTES, root, comm, stream))
                }
                Collective::Send { .. } | Collective::Recv { .. } | Collective::Barrier => {
                    Err(Error::Backend { what: "a message or a barrier was taken for a collective" })
                }
            }
        }
    }
}

impl Nccl {
    /// Makes the call of a message on the communicator of its two ranks, of which the sender is rank 0.
    ///
    /// # Safety
    ///
    /// The communicator is alive; as many bytes lie at the address, and are held until the stream is behind it.
    pub(super) unsafe fn message(
        &self,
        address: u64,
        bytes: usize,
        sends: bool,
        comm: ncclComm_t,
        stream: Stream,
    ) -> Result<()> {
        const BYTES: ncclDataType_t = ncclDataType_t::ncclUint8;
        // SAFETY: the caller's promise.
        unsafe {
            match (bytes, sends) {
                (0, _) => Ok(()),
                (_, true) => {
                    self.check("send", (self.send)(address as *const c_void, bytes, BYTES, 1, comm, stream))
                }
                (_, false) => {
                    self.check("recv", (self.recv)(address as *mut c_void, bytes, BYTES, 0, comm, stream))
                }
            }
        }
    }
}

fn equal(counts: &[usize]) -> bool {
    counts.windows(2).all(|pair| pair[0] == pair[1])
}

/// Of each block that is not empty: its rank, where it begins, its length.
fn blocks(counts: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let starts = counts.iter().scan(0, |end, &n| Some(std::mem::replace(end, *end + n)));
    starts.zip(counts).enumerate().filter(|(_, (_, n))| **n > 0).map(|(rank, (at, &n))| (rank, at, n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_lie_behind_each_other() {
        assert_eq!(blocks(&[2, 0, 3, 1]).collect::<Vec<_>>(), [(0, 0, 2), (2, 2, 3), (3, 5, 1)]);
        assert!(equal(&[4, 4]) && equal(&[]) && !equal(&[4, 4, 0]));
    }

    /// Also where they send unlike numbers of elements.
    #[test]
    fn ranks_of_a_collective_know_its_connections() {
        let connections = |op: &Collective, rank, elements: usize| {
            let bytes = elements * 4;
            Operands { op: op.clone(), dtype: DType::F32, bytes, rank, send: 0, recv: 0 }.connections()
        };
        let counts = || [5, 0, 900].into();
        let reduction = Reduction::Sum;
        for op in [
            Collective::AllGather { counts: counts() },
            Collective::AllGather { counts: [7; 3].into() },
            Collective::ReduceScatter { reduction, counts: counts() },
            Collective::Broadcast { root: 1, count: 9 },
        ] {
            assert!(!connections(&op, 0, 5).is_empty());
            assert_eq!(connections(&op, 0, 5), connections(&op, 2, 900));
        }
        let pair = |send: [usize; 2], recv: [usize; 2]| Collective::AllToAll {
            send: send.into(),
            recv: recv.into(),
        };
        assert_eq!(connections(&pair([0, 3], [0, 0]), 0, 3), [Connection::To(1)]);
        assert_eq!(connections(&pair([0, 0], [3, 0]), 1, 0), [Connection::From(0)]);
        let sums = [DType::F32, DType::Bf16].map(|dtype| {
            let op = Collective::AllReduce(reduction);
            Operands { op, dtype, bytes: 64, rank: 0, send: 0, recv: 0 }.connections()
        });
        assert_ne!(sums[0], sums[1]);
    }

    #[test]
    fn what_nccl_would_do_otherwise_is_refused() {
        let refused = |how, dtype| reduction("all_reduce", how, dtype).is_err();
        assert!(refused(Reduction::Max, DType::F32) && refused(Reduction::Sum, DType::U16));
        assert!(!refused(Reduction::Max, DType::I32) && !refused(Reduction::Sum, DType::Bf16));
    }
}
