//! A rank's view of a group.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use moe_kernels::cuda::CudaBuf;
use moe_kernels::{Cuda, Device};
use moe_topology::GroupKey;

use super::calls::{Connection, Operands, is_float};
use super::communicator::unique_id;
use super::lane::{Calls, Job, Lane};
use super::transfer::{Memory, Transfer, TransferFlight};
use super::world::Shared;
use crate::processes::{self, GroupId};
use crate::solo::SoloComm;
use crate::{Call, Collective, Flight, RawComm, Reduction, Result};

pub(super) struct NcclComm {
    pub world: Arc<Shared>,
    pub key: GroupKey,
    pub group: GroupId,
    /// World ranks in group order.
    pub ranks: Vec<usize>,
    pub rank: usize,
    /// Messages of this rank to itself.
    pub own: SoloComm<Cuda>,
    /// Of collectives: how many were started so far, and for what NCCL has connected the ranks.
    pub collectives: Lane,
    pub started: Cell<u64>,
    pub connected: RefCell<HashSet<Connection>>,
    /// Of messages, by sender and receiver: how many were started so far.
    pub messages: RefCell<HashMap<(usize, usize), (u64, Lane)>>,
}

impl NcclComm {
    /// An operation whose arguments were checked.
    fn start_checked(&self, call: Call<Cuda>) -> Result<Box<dyn Flight<Cuda>>> {
        match call.op {
            Collective::Send { to: peer, .. } | Collective::Recv { from: peer, .. } if peer == self.rank => {
                self.own.start_message(call)
            }
            Collective::Send { to, .. } => self.message(call, self.rank, to),
            Collective::Recv { from, .. } => self.message(call, from, self.rank),
            _ => self.collective(call),
        }
    }

    fn collective(&self, call: Call<Cuda>) -> Result<Box<dyn Flight<Cuda>>> {
        let (process, sequence, signature) = (&self.world.process, self.started.get(), call.signature());
        let lane = processes::Lane::All;
        if call.op == Collective::Barrier {
            self.started.set(sequence + 1);
            let arrival = process.arrive_and_wait(self.group, lane, sequence, self.rank, &signature)?;
            return Ok(Box::new(Barrier(arrival)));
        }
        let (name, Call { op, dtype, send, recv, .. }) = (call.op.name(), call);
        let (bytes, from) = match &send {
            Some((buf, bytes)) => (bytes.len(), buf.address() + bytes.start as u64),
            None => (0, 0),
        };
        // NCCL's largest of floats is the largest of those that are numbers: all are gathered instead.
        let largest = matches!(op, Collective::AllReduce(Reduction::Max)) && is_float(dtype);
        let (op, blocks) = match largest {
            true => {
                let counts = vec![bytes / dtype.size(); self.ranks.len()].into();
                (Collective::AllGather { counts }, Some(self.world.gpu.alloc(bytes * self.ranks.len())?))
            }
            false => (op, None),
        };
        let to = blocks.as_ref().or(recv.as_ref()).map_or(0, CudaBuf::address);
        let operands = Operands { op, dtype, bytes, rank: self.rank, send: from, recv: to };
        operands.check()?;
        // Where NCCL will connect ranks, they have all come before, and a call that does not fit was refused.
        let mut connected = self.connected.borrow_mut();
        let before = connected.len();
        connected.extend(operands.connections());
        let first = connected.len() > before;
        self.started.set(sequence + 1);
        let gate = match first {
            true => Some(process.arrive_and_wait(self.group, lane, sequence, self.rank, &signature)?),
            false => {
                process.arrive(self.group, lane, sequence, self.rank, &signature)?;
                None
            }
        };
        let blocks = blocks.map(|blocks| (blocks, dtype));
        // SAFETY: the communicator is alive while it takes calls; `Call::check` compared operands and buffers, which the transfer holds.
        let calls: Calls = Box::new(move |nccl, comm, stream| unsafe { operands.call(nccl, comm, stream) });
        let memory = Memory { _send: send.map(|(buf, _)| buf), recv, blocks };
        self.start_on(&self.collectives, name, gate, calls, memory)
    }

    /// A message is put on streams when both ranks have started it. So what is on a stream never waits for what a rank has yet to do,
    /// which may itself wait for the GPU: to load a kernel, say.
    fn message(&self, call: Call<Cuda>, from: usize, to: usize) -> Result<Box<dyn Flight<Cuda>>> {
        let (process, signature, sends) = (&self.world.process, call.signature(), self.rank == from);
        let mut messages = self.messages.borrow_mut();
        let (sequence, lane) = match messages.entry((from, to)) {
            Entry::Occupied(lane) => lane.into_mut(),
            Entry::Vacant(lane) => lane.insert((0, self.message_lane(from, to)?)),
        };
        let (pair, index) = (processes::Lane::Pair(from, to), usize::from(!sends));
        let gate = process.arrive_and_wait(self.group, pair, *sequence, index, &signature)?;
        *sequence += 1;
        let (address, bytes) = match (&call.send, &call.recv) {
            (Some((buf, bytes)), _) => (buf.address() + bytes.start as u64, bytes.len()),
            (None, Some(buf)) => (buf.address(), Cuda::byte_len(buf)),
            (None, None) => (0, 0),
        };
        // SAFETY: as above.
        let calls: Calls =
            Box::new(move |nccl, comm, stream| unsafe { nccl.message(address, bytes, sends, comm, stream) });
        let memory = Memory { _send: call.send.map(|(buf, _)| buf), recv: call.recv, blocks: None };
        self.start_on(lane, call.op.name(), Some(gate), calls, memory)
    }

    /// The two ranks meet at the first message; the sender is rank 0 of their communicator.
    fn message_lane(&self, from: usize, to: usize) -> Result<Lane> {
        let (key, group, sends) = (self.key, self.group, self.rank == from);
        let ends = [from, to].map(|position| self.ranks[position]);
        let name = format!("messages {} to {}", ends[0], ends[1]);
        Lane::new(
            &self.world,
            name,
            Box::new(move |world| {
                let offer = if sends { Some(unique_id(world.nccl)?) } else { None };
                let (_, id) = world.process.meet(key, Some(group), &ends, offer)?;
                world.communicator(&id, usize::from(!sends), 2)
            }),
        )
    }

    fn start_on(
        &self,
        lane: &Lane,
        name: &'static str,
        gate: Option<processes::Arrival>,
        calls: Calls,
        memory: Memory,
    ) -> Result<Box<dyn Flight<Cuda>>> {
        let Shared { process, gpu, .. } = &*self.world;
        let transfer = Transfer::new(gpu, memory);
        // The other ranks rely on the operation from here on.
        let after = gpu.mark().map_err(|error| process.fail(&error.to_string()))?;
        lane.start(Job { name, gate, after, calls, transfer: transfer.clone() })?;
        Ok(Box::new(TransferFlight { process: process.clone(), transfer }))
    }
}

impl RawComm<Cuda> for NcclComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.ranks.len()
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn key(&self) -> GroupKey {
        self.key
    }

    fn start(&self, call: Call<Cuda>) -> Result<Box<dyn Flight<Cuda>>> {
        call.check(self.rank, self.size())?;
        self.start_checked(call)
    }

    fn start_batch(&self, calls: Vec<Call<Cuda>>) -> Result<Vec<Box<dyn Flight<Cuda>>>> {
        calls.iter().try_for_each(|call| call.check(self.rank, self.size()))?;
        // Starting never blocks, and messages wait for those in the same direction alone: any order is free of deadlock.
        calls.into_iter().map(|call| self.start_checked(call)).collect()
    }

    fn abort(&self, why: &str) {
        self.world.process.fail(&format!("aborted: {why}"));
    }
}

/// A barrier is kept by the hub: hosts wait for it, whatever their GPUs do.
struct Barrier(processes::Arrival);

impl Flight<Cuda> for Barrier {
    fn ready(&self) -> Result<bool> {
        self.0.ready()
    }

    fn wait(self: Box<Self>) -> Result<Option<CudaBuf>> {
        self.0.wait().map(|()| None)
    }
}
