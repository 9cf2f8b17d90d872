//! A thread's view of its world and of its groups.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use moe_kernels::cpu::{Cpu, CpuBuf};
use moe_topology::GroupKey;

use super::job::Operation;
use crate::board::{Board, Lane, Members, Seat, Ticket};
use crate::raw::position;
use crate::{Call, Collective, Flight, RawComm, Result, World};

/// What the ranks of a world share.
pub(super) struct Shared {
    pub(super) board: Arc<Board<Operation>>,
    groups: Mutex<HashMap<GroupName, Arc<Members>>>,
}

/// The ranks of a group, and how many times they had made a group before.
type GroupName = (Vec<usize>, usize);

impl Shared {
    pub(super) fn new(board: Board<Operation>) -> Self {
        Shared { board: Arc::new(board), groups: Mutex::default() }
    }

    fn group(&self, name: GroupName) -> Arc<Members> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let id = groups.len();
        let ranks = name.0.clone().into_boxed_slice();
        groups.entry(name).or_insert_with(|| Arc::new(Members { id, ranks })).clone()
    }
}

/// Held by whatever can start operations of a rank. When the last one goes, ranks that wait for it are told.
pub(super) struct Presence {
    pub(super) shared: Arc<Shared>,
    pub(super) rank: usize,
    /// Whether the world's first failure is that this rank aborted: its own error says why.
    pub(super) aborted: AtomicBool,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.shared.board.leave(self.rank);
    }
}

/// One rank of a [`ThreadWorld`](super::ThreadWorld).
pub struct ThreadRank {
    presence: Arc<Presence>,
    size: usize,
    made: RefCell<HashMap<Vec<usize>, usize>>,
}

impl ThreadRank {
    pub(super) fn new(presence: Arc<Presence>, size: usize) -> Self {
        ThreadRank { presence, size, made: RefCell::default() }
    }
}

impl fmt::Debug for ThreadRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ThreadRank({} of {})", self.presence.rank, self.size)
    }
}

impl World<Cpu> for ThreadRank {
    fn rank(&self) -> usize {
        self.presence.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<Cpu>>> {
        let rank = position(key, ranks, self.rank(), self.size)?;
        let mut made = self.made.borrow_mut();
        let times = made.entry(ranks.to_vec()).or_default();
        let group = self.presence.shared.group((ranks.to_vec(), *times));
        *times += 1;
        let peers = group.ranks.len();
        Ok(Box::new(ThreadComm {
            presence: self.presence.clone(),
            key,
            group,
            rank,
            collectives: Cell::new(0),
            sends: vec![Cell::new(0); peers],
            recvs: vec![Cell::new(0); peers],
        }))
    }
}

struct ThreadComm {
    presence: Arc<Presence>,
    key: GroupKey,
    group: Arc<Members>,
    rank: usize,
    /// Operations started so far, messages apart.
    collectives: Cell<u64>,
    /// Messages sent so far, by receiver.
    sends: Vec<Cell<u64>>,
    /// Messages asked for so far, by sender.
    recvs: Vec<Cell<u64>>,
}

impl ThreadComm {
    fn seat(&self, op: &Collective) -> Seat {
        let (lane, index, counter) = match *op {
            Collective::Send { to, .. } => (Lane::Pair(self.rank, to), 0, &self.sends[to]),
            Collective::Recv { from, .. } => (Lane::Pair(from, self.rank), 1, &self.recvs[from]),
            _ => (Lane::All, self.rank, &self.collectives),
        };
        let sequence = counter.replace(counter.get() + 1);
        Seat { group: self.group.clone(), lane, sequence, index }
    }

    fn start_checked(&self, call: Call<Cpu>) -> Result<Box<dyn Flight<Cpu>>> {
        let (seat, signature) = (self.seat(&call.op), call.signature());
        Ok(Box::new(ThreadFlight(self.presence.shared.board.arrive(&seat, signature, call.send, call.recv)?)))
    }
}

impl RawComm<Cpu> for ThreadComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.ranks.len()
    }

    fn ranks(&self) -> &[usize] {
        &self.group.ranks
    }

    fn key(&self) -> GroupKey {
        self.key
    }

    fn start(&self, call: Call<Cpu>) -> Result<Box<dyn Flight<Cpu>>> {
        call.check(self.rank, self.size())?;
        self.start_checked(call)
    }

    fn start_batch(&self, calls: Vec<Call<Cpu>>) -> Result<Vec<Box<dyn Flight<Cpu>>>> {
        calls.iter().try_for_each(|call| call.check(self.rank, self.size()))?;
        // Starting never blocks, so any order is free of deadlock.
        calls.into_iter().map(|call| self.start_checked(call)).collect()
    }

    fn abort(&self, why: &str) {
        if self.presence.shared.board.fail(self.presence.rank, format!("aborted: {why}")) {
            self.presence.aborted.store(true, Ordering::Relaxed);
        }
    }
}

struct ThreadFlight(Ticket<Operation>);

impl Flight<Cpu> for ThreadFlight {
    fn ready(&self) -> Result<bool> {
        self.0.ready()
    }

    fn wait(self: Box<Self>) -> Result<Option<CpuBuf>> {
        self.0.wait()
    }
}
