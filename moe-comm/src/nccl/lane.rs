//! What puts operations on a stream.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclComm_t;
use moe_kernels::cuda::Mark;

use super::communicator::Communicator;
use super::library::{Nccl, Stream};
use super::transfer::Transfer;
use super::world::Shared;
use crate::Result;
use crate::processes::Arrival;
use crate::world_error::panic_message;

/// A communicator with a thread of its own: NCCL blocks where ranks connect for the first time, and ranks do not block where they start
/// operations. The collectives of a group have one, and the messages from one of its ranks to another.
pub(super) struct Lane {
    world: Arc<Shared>,
    jobs: Sender<Job>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Once the ranks are connected.
    communicator: OnceLock<Arc<Communicator>>,
    /// Operations that the thread has to put on the stream.
    queued: AtomicUsize,
}

/// An operation to be put on the stream.
pub(super) struct Job {
    pub name: &'static str,
    /// That all ranks have started it, where that comes first.
    pub gate: Option<Arrival>,
    /// What it comes after.
    pub after: Mark,
    /// Makes the calls, on memory that `transfer` holds.
    pub calls: Calls,
    pub transfer: Arc<Transfer>,
}

pub(super) type Calls = Box<dyn FnOnce(&Nccl, ncclComm_t, Stream) -> Result<()> + Send>;

/// Makes a lane's communicator, with the ranks at its other end.
pub(super) type Connect = Box<dyn FnOnce(&Shared) -> Result<Arc<Communicator>> + Send>;

/// How long a lane looks for the next operation before it sleeps, as waking takes longer than most operations are apart.
const SPIN: Duration = Duration::from_micros(50);

impl Lane {
    pub(super) fn new(world: &Arc<Shared>, name: String, connect: Connect) -> Result<Self> {
        let (jobs, receiver) = channel();
        let state = Arc::new(State::default());
        let (shared, own) = (world.clone(), state.clone());
        let run = move || {
            let ended = catch_unwind(AssertUnwindSafe(|| run(&shared, &own, connect, &receiver)));
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => drop(shared.suspect(&error.to_string())),
                Err(panic) => drop(shared.process.fail(&format!("panicked: {}", panic_message(&*panic)))),
            }
        };
        match thread::Builder::new().name(name).spawn(run) {
            Ok(thread) => world.keep(thread),
            Err(why) => return Err(world.process.fail(&format!("no thread for a communicator: {why}"))),
        }
        Ok(Lane { world: world.clone(), jobs, state })
    }

    /// Without the thread where nothing could block: then operations of all lanes are put on streams in the order in which this rank
    /// starts them, as NCCL would have it.
    pub(super) fn start(&self, job: Job) -> Result<()> {
        if job.gate.is_none()
            && self.state.queued.load(Ordering::Acquire) == 0
            && let Some(communicator) = self.state.communicator.get()
        {
            return place(communicator, job).map_err(|error| self.world.suspect(&error.to_string()));
        }
        self.state.queued.fetch_add(1, Ordering::Relaxed);
        // The thread ends early only when the world has failed, which whoever waits for the operation finds.
        let _ = self.jobs.send(job);
        Ok(())
    }
}

fn run(world: &Shared, state: &State, connect: Connect, jobs: &Receiver<Job>) -> Result<()> {
    let made = connect(world)?;
    let communicator = state.communicator.get_or_init(|| made);
    while let Some(mut job) = next(jobs) {
        if let Some(gate) = job.gate.take() {
            gate.wait()?;
        }
        place(communicator, job)?;
        state.queued.fetch_sub(1, Ordering::Release);
    }
    communicator.drain();
    Ok(())
}

fn place(communicator: &Communicator, job: Job) -> Result<()> {
    let Job { name, after, calls, transfer, .. } = job;
    communicator.follow(&after)?;
    match communicator.enqueue(name, calls) {
        Ok(done) => transfer.place(done),
        Err(error) => {
            // What NCCL launched before it failed may use the memory yet: it is never given back.
            std::mem::forget(transfer);
            Err(error)
        }
    }
}

fn next(jobs: &Receiver<Job>) -> Option<Job> {
    let begin = Instant::now();
    while begin.elapsed() < SPIN {
        if let Ok(job) = jobs.try_recv() {
            return Some(job);
        }
        std::hint::spin_loop();
    }
    jobs.recv().ok()
}
