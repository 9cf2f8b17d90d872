//! Operations on their way, with the memory that they hold.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moe_kernels::cuda::{CudaBuf, Mark};
use moe_kernels::{Cuda, DType};

use crate::processes::Process;
use crate::{Flight, Result};

/// How often a rank that waits for a place on a stream looks whether the world has failed.
const LOOK: Duration = Duration::from_millis(50);

const SPIN: Duration = Duration::from_micros(50);

/// An operation that is put on a stream sooner or later: a collective at once, a message when the ranks have met for the first one.
pub(super) struct Transfer {
    gpu: Cuda,
    state: Mutex<State>,
    placed: Condvar,
    is_placed: AtomicBool,
}

struct State {
    /// Where the operation ends on its stream, once it is there.
    done: Option<Arc<Mark>>,
    /// Nobody waits for it any more.
    abandoned: bool,
    memory: Memory,
}

/// What an operation reads and writes.
#[derive(Default)]
pub(super) struct Memory {
    /// Held, so that nobody writes it.
    pub _send: Option<Arc<CudaBuf>>,
    pub recv: Option<CudaBuf>,
    /// Blocks of all ranks, of which `recv` gets the largest of each element.
    pub blocks: Option<(CudaBuf, DType)>,
}

impl Transfer {
    pub(super) fn new(gpu: &Cuda, memory: Memory) -> Arc<Self> {
        let state = Mutex::new(State { done: None, abandoned: false, memory });
        Arc::new(Transfer {
            gpu: gpu.clone(),
            state,
            placed: Condvar::new(),
            is_placed: AtomicBool::new(false),
        })
    }

    /// Says where it ends on its stream.
    pub(super) fn place(&self, done: Arc<Mark>) -> Result<()> {
        let mut state = self.lock();
        if state.abandoned {
            // Memory goes back behind the operation.
            self.gpu.follow(&done)?;
            state.memory = Memory::default();
        }
        state.done = Some(done);
        self.is_placed.store(true, Ordering::Release);
        self.placed.notify_all();
        Ok(())
    }

    fn is_done(&self) -> Result<bool> {
        // The query is made without the lock.
        let done = self.lock().done.clone();
        Ok(done.map(|done| done.is_reached()).transpose()?.unwrap_or(false))
    }

    /// Orders the GPU's work behind it, and returns what was received.
    fn wait(&self, process: &Process) -> Result<Option<CudaBuf>> {
        // What was just started is placed sooner than a thread sleeps and wakes.
        let begin = Instant::now();
        while !self.is_placed.load(Ordering::Acquire) && begin.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let mut state = self.lock();
        let done = loop {
            if let Some(failure) = process.failure() {
                return Err(failure);
            }
            match &state.done {
                Some(done) => break done.clone(),
                None => {
                    state = self.placed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0
                }
            }
        };
        self.gpu.follow(&done)?;
        // From here on memory may go back.
        state.done = None;
        let Memory { mut recv, blocks, _send } = std::mem::take(&mut state.memory);
        if let (Some(recv), Some((blocks, dtype))) = (&mut recv, blocks) {
            self.gpu.max_of_blocks(recv, &blocks, dtype)?;
        }
        Ok(recv)
    }

    fn abandon(&self) {
        let mut state = self.lock();
        state.abandoned = true;
        if let Some(done) = &state.done {
            // Where this fails the context does, and no memory is given back by anyone.
            let _ = self.gpu.follow(done);
            state.memory = Memory::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is behind the lock is whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A rank's hold on a transfer.
pub(super) struct TransferFlight {
    pub process: Process,
    pub transfer: Arc<Transfer>,
}

impl Flight<Cuda> for TransferFlight {
    fn ready(&self) -> Result<bool> {
        match self.process.failure() {
            Some(failure) => Err(failure),
            None => self.transfer.is_done(),
        }
    }

    fn wait(self: Box<Self>) -> Result<Option<CudaBuf>> {
        self.transfer.wait(&self.process)
    }
}

impl Drop for TransferFlight {
    fn drop(&mut self) {
        self.transfer.abandon();
    }
}
