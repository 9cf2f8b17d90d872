//! What puts operations on a stream.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclComm_t;
use moe_kernels::cuda::Mark;

use super::communicator::Communicator;
use super::library::{Nccl, Stream};
use super::transfer::Transfer;
use super::world::Shared;
use crate::Result;
use crate::processes::Arrival;

/// A communicator with a thread of its own: NCCL blocks where ranks connect for the first time, and ranks do not block where they start
/// operations. The collectives of a group have one, and the messages from one of its ranks to another.
pub(super) struct Lane {
    world: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    thread: JoinHandle<()>,
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
pub(super) type Connect = Box<dyn FnOnce(&Arc<Shared>) -> Result<Arc<Communicator>> + Send>;

/// How long a lane looks for the next operation before it sleeps, as waking takes longer than most operations are apart.
const SPIN: Duration = Duration::from_micros(50);
/// How long after the world's failure the threads of lanes may take to end.
const GRACE: Duration = Duration::from_secs(2);
/// How often the end of a lane looks whether its thread has ended.
const LOOK: Duration = Duration::from_micros(200);

impl Lane {
    pub(super) fn new(world: &Arc<Shared>, name: String, connect: Connect) -> Result<Self> {
        let (jobs, receiver) = channel();
        // The thread is no reason for the world to stay.
        let shared = Arc::downgrade(world);
        let run = move || {
            if let Err(error) = run(&shared, connect, &receiver)
                && let Some(world) = shared.upgrade()
            {
                world.process.fail(&error.to_string());
            }
        };
        match thread::Builder::new().name(name).spawn(run) {
            Ok(thread) => Ok(Lane { world: world.clone(), jobs: Some(jobs), thread }),
            Err(why) => Err(world.process.fail(&format!("no thread for a communicator: {why}"))),
        }
    }

    pub(super) fn start(&self, job: Job) {
        // The thread ends early only when the world has failed, which whoever waits for the operation finds.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Operations that were started go their way. When the world has failed the thread ends at once, unless NCCL waits in a call for
        // ranks that do not come.
        drop(self.jobs.take());
        while !self.thread.is_finished() && self.world.failed.get().is_none_or(|at| at.elapsed() <= GRACE) {
            thread::sleep(LOOK);
        }
    }
}

fn run(world: &Weak<Shared>, connect: Connect, jobs: &Receiver<Job>) -> Result<()> {
    let Some(shared) = world.upgrade() else { return Ok(()) };
    let communicator = connect(&shared)?;
    drop(shared);
    while let Some(Job { name, gate, after, calls, transfer }) = next(jobs) {
        if let Some(gate) = gate {
            gate.wait()?;
        }
        communicator.follow(&after)?;
        transfer.place(communicator.enqueue(name, calls)?)?;
    }
    Ok(())
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
