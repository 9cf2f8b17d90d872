//! A world of processes, each with a GPU.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use moe_kernels::Cuda;
use moe_topology::GroupKey;

use super::comm::NcclComm;
use super::communicator::{Communicator, unique_id};
use super::lane::Lane;
use super::library::Nccl;
use crate::processes::Process;
use crate::raw::position;
use crate::solo::{Failed, SoloComm};
use crate::world_error::{BoxError, WorldError, panic_message};
use crate::{Error, RawComm, Result, World};

/// How often communicators are asked for errors.
const LOOK: Duration = Duration::from_millis(100);
/// How long NCCL's word waits for the hub's.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the body of a rank may take to notice that its world has failed.
const GRACE: Duration = Duration::from_secs(5);

/// One rank of a world of processes, with its GPU.
///
/// Collectives of a group are on a stream of its communicator, messages of each direction on another: what was started goes on beside
/// the GPU's kernels, and [`Flight::wait`](crate::Flight::wait) orders the kernels that follow behind it without waiting on the host. When the
/// world fails, everything on these streams is ended, and the GPU's waits return
/// [`moe_kernels::Error::Interrupted`] with the reason.
pub struct NcclWorld {
    shared: Arc<Shared>,
}

/// What the communicators of a rank share.
pub(super) struct Shared {
    pub process: Process,
    pub gpu: Cuda,
    pub nccl: &'static Nccl,
    communicators: Mutex<Vec<Weak<Communicator>>>,
    /// When NCCL began to connect the ranks of communicators that are being made.
    connecting: Mutex<Vec<Instant>>,
    /// Those of lanes.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// When the world has.
    failed: OnceLock<Instant>,
}

impl Shared {
    /// Collective over the ranks that know `id`.
    pub(super) fn communicator(&self, id: &[u8], rank: usize, size: usize) -> Result<Arc<Communicator>> {
        let begin = Instant::now();
        lock(&self.connecting).push(begin);
        let made = Communicator::new(self, id, rank, size);
        lock(&self.connecting).retain(|one| *one != begin);
        let communicator = Arc::new(made?);
        let mut all = lock(&self.communicators);
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(&communicator));
        drop(all);
        // The world may have failed meanwhile, and have ended the others.
        match self.process.failure() {
            Some(failure) => {
                communicator.abort();
                Err(failure)
            }
            None => Ok(communicator),
        }
    }

    fn all(&self) -> Vec<Arc<Communicator>> {
        lock(&self.communicators).iter().filter_map(Weak::upgrade).collect()
    }

    /// What has gone wrong in NCCL, or takes longer than `limit`.
    fn trouble(&self, limit: Duration) -> Option<String> {
        if lock(&self.connecting).iter().any(|begin| begin.elapsed() > limit) {
            return Some(format!(
                "NCCL has not connected ranks within {limit:?}: can they reach each other over NCCL_SOCKET_IFNAME?"
            ));
        }
        self.all().into_iter().find_map(|communicator| communicator.trouble(limit))
    }

    /// Fails the world for what NCCL says, unless the hub soon says why: NCCL may be the first to hear that a rank has ended. Returns the
    /// world's failure.
    pub(super) fn suspect(&self, why: &str) -> Error {
        let begin = Instant::now();
        while self.process.failure().is_none() && begin.elapsed() < PATIENCE {
            thread::sleep(PATIENCE / 50);
        }
        self.process.fail(why)
    }

    /// Keeps the thread of a lane, which ends by itself.
    pub(super) fn keep(&self, thread: JoinHandle<()>) {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Waits for the threads of lanes: operations that were started go their way. When the world has failed they end at once, unless NCCL
    /// keeps one in a call for ranks that do not come.
    fn settle(&self) {
        let ended = || lock(&self.threads).iter().all(JoinHandle::is_finished);
        while !ended() && self.failed.get().is_none_or(|at| at.elapsed() <= GRACE / 2) {
            thread::sleep(Duration::from_micros(200));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NcclWorld {
    /// Whether NCCL is there.
    ///
    /// # Errors
    /// [`moe_kernels::Error::Library`] as [`Error::Device`], with how to get it.
    pub fn probe() -> Result<()> {
        Nccl::get().map(drop)
    }

    /// Runs `body` as the rank of this process, and returns what it returns. NCCL over `gpu` moves the data; the hub that `process` has
    /// joined compares calls, keeps deadlines and passes failures on.
    ///
    /// # Errors
    /// The first failure of the world, as for [`ThreadWorld::run`](crate::ThreadWorld::run): this rank then has five seconds to notice,
    /// after which it is left behind (and named in [`WorldError::running`]). NCCL is missing
    /// ([`moe_kernels::Error::Library`] in [`WorldError::source`]).
    pub fn run<R, E, F>(process: Process, gpu: Cuda, body: F) -> std::result::Result<R, WorldError>
    where
        R: Send + 'static,
        E: Into<BoxError> + 'static,
        F: FnOnce(&NcclWorld) -> std::result::Result<R, E> + Send + 'static,
    {
        let failed = |source: Option<BoxError>, why: &str, running| {
            let failure = process.fail(why);
            let own = matches!(failure, Error::Poisoned { rank, .. } if rank == process.rank());
            WorldError { failure, source: source.filter(|_| own), running }
        };
        let nccl =
            Nccl::get().map_err(|error| failed(Some(error.clone().into()), &error.to_string(), vec![]))?;
        let shared = Arc::new(Shared {
            process: process.clone(),
            gpu,
            nccl,
            communicators: Mutex::default(),
            connecting: Mutex::default(),
            threads: Mutex::default(),
            failed: OnceLock::new(),
        });
        end_with_the_world(&shared);
        let watch = Watch::new(&shared);
        let world = NcclWorld { shared };
        let (sender, receiver) = channel();
        let spawned = thread::Builder::new().name(format!("rank {}", process.rank())).spawn(move || {
            let ended = catch_unwind(AssertUnwindSafe(|| body(&world).map_err(Into::into)));
            // Others may wait for this rank: they are told before it waits for them.
            match &ended {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(BoxError::to_string(error)),
                Err(panic) => Some(format!("panicked: {}", panic_message(&**panic))),
            }
            .map(|why| world.shared.process.fail(&why));
            world.shared.settle();
            // What else has the process goes before the end is told, so that it is not the last to have it.
            drop(watch);
            drop(world);
            // The receiver is gone if this rank ended too late.
            let _ = sender.send(ended);
        });
        if let Err(error) = spawned {
            return Err(failed(None, &format!("its thread could not be started: {error}"), vec![]));
        }
        let mut give_up = None;
        loop {
            if give_up.is_none() && process.failure().is_some() {
                give_up = Some(Instant::now() + GRACE);
            }
            match receiver.recv_timeout(LOOK) {
                Ok(Ok(Ok(value))) => match process.failure() {
                    None => return Ok(value),
                    Some(failure) => return Err(WorldError { failure, source: None, running: vec![] }),
                },
                Ok(Ok(Err(error))) => {
                    let error: BoxError = error;
                    let why = error.to_string();
                    return Err(failed(Some(error), &why, vec![]));
                }
                Ok(Err(panic)) => {
                    return Err(failed(None, &format!("panicked: {}", panic_message(&*panic)), vec![]));
                }
                Err(RecvTimeoutError::Timeout) if give_up.is_none_or(|at| Instant::now() < at) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(failed(None, "its thread did not end", vec![process.rank()]));
                }
            }
        }
    }
}

/// Ends everything when the world fails.
fn end_with_the_world(shared: &Arc<Shared>) {
    let ending = Arc::downgrade(shared);
    shared.process.on_failure(move |failure| {
        let Some(shared) = ending.upgrade() else { return };
        shared.failed.get_or_init(Instant::now);
        // First, so that what waits for the GPU finds it when streams go on.
        shared.gpu.interrupt(&failure.to_string());
        // Each on a thread of its own: NCCL gives memory back in an abort, which waits for the GPU, and so for operations of communicators
        // whose turn has not come.
        for communicator in shared.all() {
            let spare = communicator.clone();
            let aborting = thread::Builder::new().name("abort".into()).spawn(move || communicator.abort());
            if aborting.is_err() {
                spare.abort();
            }
        }
    });
}

/// Looks for what NCCL or the clock says has failed, as long as it lives.
struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn new(shared: &Arc<Shared>) -> Self {
        let (stop, stopped) = channel();
        let watched = shared.clone();
        let looking = move || {
            // All have arrived within a deadline, or the hub says who has not; moving the data may take another.
            let limit = 2 * watched.process.deadline();
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout)
                && watched.process.failure().is_none()
            {
                if let Some(trouble) = watched.trouble(limit) {
                    watched.suspect(&trouble);
                }
            }
        };
        let thread = thread::Builder::new().name("nccl watch".into()).spawn(looking);
        if let Err(error) = &thread {
            shared.process.fail(&format!("no thread that watches NCCL: {error}"));
        }
        Watch { stop: Some(stop), thread: thread.ok() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It does not panic.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl fmt::Debug for NcclWorld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let process = &self.shared.process;
        write!(f, "NcclWorld({} of {}, {:?})", process.rank(), process.size(), self.shared.gpu)
    }
}

impl World<Cuda> for NcclWorld {
    fn rank(&self) -> usize {
        self.shared.process.rank()
    }

    fn size(&self) -> usize {
        self.shared.process.size()
    }

    fn communicator(&self, key: GroupKey, ranks: &[usize]) -> Result<Box<dyn RawComm<Cuda>>> {
        let Shared { process, gpu, nccl, .. } = &*self.shared;
        let rank = position(key, ranks, self.rank(), self.size())?;
        let own = SoloComm::new(gpu.clone(), Failed::Of(process.clone()), key, self.rank());
        if ranks.len() == 1 {
            return match process.failure() {
                Some(failure) => Err(failure),
                None => Ok(Box::new(own)),
            };
        }
        let offer = if rank == 0 { Some(unique_id(nccl)?) } else { None };
        let (group, id) = process.meet(key, None, ranks, offer)?;
        let size = ranks.len();
        let connect = move |world: &Shared| world.communicator(&id, rank, size);
        let collectives = Lane::new(&self.shared, format!("collectives of {key}"), Box::new(connect))?;
        Ok(Box::new(NcclComm {
            world: self.shared.clone(),
            key,
            group,
            ranks: ranks.to_vec(),
            rank,
            own,
            collectives,
            started: Cell::new(0),
            connected: RefCell::default(),
            messages: RefCell::default(),
        }))
    }
}
