//! A communicator of NCCL with the stream that its operations are on.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use moe_kernels::Cuda;
use moe_kernels::cuda::{Mark, SideStream};

use super::library::{Nccl, Stream};
use super::world::Shared;
use crate::processes::Process;
use crate::{Error, Result};

/// An identity that one rank makes and the others of a group are told.
pub(super) fn unique_id(nccl: &Nccl) -> Result<Vec<u8>> {
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: the pointer is valid for writing.
    nccl.check("ncclGetUniqueId", unsafe { (nccl.unique_id)(&mut id) })?;
    Ok(id.internal.map(|c| c as u8).to_vec())
}

fn parse(bytes: &[u8]) -> Result<ncclUniqueId> {
    let bytes: [u8; 128] =
        bytes.try_into().map_err(|_| Error::Backend { what: "an identity of NCCL that is not 128 bytes" })?;
    Ok(ncclUniqueId { internal: bytes.map(|b| b as std::ffi::c_char) })
}

/// How often the end of a communicator looks whether its operations have ended.
const LOOK: Duration = Duration::from_micros(200);
/// How long the abort of a communicator waits for a call that is under way.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) struct Communicator {
    nccl: &'static Nccl,
    gpu: Cuda,
    process: Process,
    stream: SideStream,
    state: Mutex<State>,
    /// The operation whose calls are being made, and since when.
    calling: Mutex<Option<(&'static str, Instant)>>,
}

struct State {
    /// None once it was aborted.
    comm: Option<ncclComm_t>,
    /// Operations that the stream had not come behind when they were last looked at, in their order.
    pending: VecDeque<Operation>,
}

/// An operation on the stream.
struct Operation {
    done: Arc<Mark>,
    started: Instant,
    name: &'static str,
}

// SAFETY: NCCL takes calls of a communicator from any thread, one at a time: the lock sees to that.
unsafe impl Send for State {}

impl Communicator {
    /// Collective over its ranks; blocks until all have called.
    pub(super) fn new(world: &Shared, id: &[u8], rank: usize, size: usize) -> Result<Self> {
        let Shared { nccl, gpu, process, .. } = world;
        let (id, mut comm) = (parse(id)?, std::ptr::null_mut());
        let stream = SideStream::new(gpu)?;
        gpu.make_current()?;
        // SAFETY: the pointer is valid for writing; the identity came from `unique_id`.
        nccl.check("ncclCommInitRank", unsafe { (nccl.init_rank)(&mut comm, size as i32, id, rank as i32) })?;
        let state = Mutex::new(State { comm: Some(comm), pending: VecDeque::new() });
        let (gpu, process) = (gpu.clone(), process.clone());
        Ok(Communicator { nccl, gpu, process, stream, state, calling: Mutex::new(None) })
    }

    /// What is enqueued from now on begins behind `mark`.
    pub(super) fn follow(&self, mark: &Mark) -> Result<()> {
        Ok(self.stream.follow(mark)?)
    }

    /// Puts an operation, which `calls` makes of one or several calls, on the stream. It is as one to NCCL: its parts do not wait for
    /// each other.
    pub(super) fn enqueue(
        &self,
        name: &'static str,
        calls: impl FnOnce(&Nccl, ncclComm_t, Stream) -> Result<()>,
    ) -> Result<Arc<Mark>> {
        let mut state = lock(&self.state);
        self.alive()?;
        let comm = state
            .comm
            .ok_or(Error::Backend { what: "a communicator was used after its world had failed" })?;
        self.gpu.make_current()?;
        *lock(&self.calling) = Some((name, Instant::now()));
        // SAFETY: the library's calls have no requirements; each start is followed by an end.
        self.nccl.check("ncclGroupStart", unsafe { (self.nccl.group_start)() })?;
        let called = calls(self.nccl, comm, self.stream.handle());
        // SAFETY: as above.
        let ended = self.nccl.check("ncclGroupEnd", unsafe { (self.nccl.group_end)() });
        *lock(&self.calling) = None;
        called.and(ended)?;
        if let Err(failure) = self.alive() {
            // Who ends the world may have found the lock taken.
            self.abort_locked(&mut state);
            return Err(failure);
        }
        let done = Arc::new(self.stream.mark()?);
        state.pending.push_back(Operation { done: done.clone(), started: Instant::now(), name });
        Ok(done)
    }

    /// What has gone wrong with operations since they were started; that the oldest of them takes longer than `limit`.
    pub(super) fn trouble(&self, limit: Duration) -> Option<String> {
        if let Some((name, since)) = *lock(&self.calling)
            && since.elapsed() > limit
        {
            return Some(format!("NCCL has kept a call of {name} for {limit:?}"));
        }
        let mut state = self.state.try_lock().ok()?;
        let comm = state.comm?;
        // SAFETY: it is alive while it is in the state.
        if let Err(error) = unsafe { self.nccl.check_async(comm) } {
            return Some(error.to_string());
        }
        while let Some(Operation { done, started, name }) = state.pending.front() {
            match done.is_reached() {
                Ok(true) => state.pending.pop_front(),
                Ok(false) if started.elapsed() > limit => {
                    return Some(format!("{name} has not ended {limit:?} after it was started"));
                }
                Ok(false) => return None,
                Err(error) => return Some(error.to_string()),
            };
        }
        None
    }

    /// Ends what is on the stream, so that what waits for it goes on. A thread that NCCL keeps in a call (waiting for ranks that are gone)
    /// is left there.
    pub(super) fn abort(&self) {
        let begin = Instant::now();
        let mut state = loop {
            match self.state.try_lock() {
                Ok(state) => break state,
                Err(std::sync::TryLockError::Poisoned(state)) => break state.into_inner(),
                Err(std::sync::TryLockError::WouldBlock) if begin.elapsed() > PATIENCE => return,
                Err(std::sync::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        self.abort_locked(&mut state);
    }

    fn abort_locked(&self, state: &mut State) {
        if let Some(comm) = state.comm.take() {
            // Where the context cannot be used any more there is nothing left to end.
            let _ = self.gpu.make_current();
            // SAFETY: it was alive, and nobody uses it from here on.
            unsafe { (self.nccl.abort)(comm) };
        }
    }

    /// Waits until the stream is behind all operations, or the world has failed.
    pub(super) fn drain(&self) {
        let done =
            || lock(&self.state).pending.back().is_none_or(|last| last.done.is_reached().unwrap_or(true));
        while self.process.failure().is_none() && !done() {
            std::thread::sleep(LOOK);
        }
    }

    fn alive(&self) -> Result<()> {
        self.process.failure().map_or(Ok(()), Err)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = state.comm.take() else { return };
        let _ = self.gpu.make_current();
        // What is on the stream has ended, unless the world has failed.
        let end = if self.process.failure().is_some() { self.nccl.abort } else { self.nccl.destroy };
        // SAFETY: it is alive, and nobody uses it from here on.
        unsafe { end(comm) };
    }
}
