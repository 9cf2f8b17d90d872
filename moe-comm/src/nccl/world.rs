//! A world of processes, each with a GPU.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread;
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
use crate::{RawComm, Result, World};

/// How often communicators are asked for errors.
const LOOK: Duration = Duration::from_millis(100);
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
    /// When the world has.
    pub failed: OnceLock<Instant>,
}

impl Shared {
    /// Collective over the ranks that know `id`.
    pub(super) fn communicator(&self, id: &[u8], rank: usize, size: usize) -> Result<Arc<Communicator>> {
        let communicator = Arc::new(Communicator::new(self, id, rank, size)?);
        let mut all = self.communicators.lock().unwrap_or_else(PoisonError::into_inner);
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
        let all = self.communicators.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter_map(Weak::upgrade).collect()
    }
}

impl NcclWorld {
    /// Whether NCCL is there.
    ///
    /// # Errors
    /// [`moe_kernels::Error::Library`] as [`Error::Device`](crate::Error::Device), with how to get it.
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
            let own = matches!(failure, crate::Error::Poisoned { rank, .. } if rank == process.rank());
            WorldError { failure, source: source.filter(|_| own), running }
        };
        let nccl =
            Nccl::get().map_err(|error| failed(Some(error.clone().into()), &error.to_string(), vec![]))?;
        let shared = Arc::new(Shared {
            process: process.clone(),
            gpu,
            nccl,
            communicators: Mutex::default(),
            failed: OnceLock::new(),
        });
        watch(&shared);
        let world = NcclWorld { shared };
        let (sender, receiver) = channel();
        let spawned = thread::Builder::new().name(format!("rank {}", process.rank())).spawn(move || {
            let ended = catch_unwind(AssertUnwindSafe(|| body(&world).map_err(Into::into)));
            // Communicators are gone with the body; the world goes before the end is told.
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
                Ok(Ok(Ok(value))) => return Ok(value),
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

/// Ends everything when the world fails, and looks for what NCCL or the clock says has failed.
fn watch(shared: &Arc<Shared>) {
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
    let (watched, deadline) = (Arc::downgrade(shared), shared.process.deadline());
    let looking = move || {
        while let Some(shared) = watched.upgrade() {
            if shared.process.failure().is_some() {
                return;
            }
            // All have arrived within a deadline, or the hub says who has not; moving the data may take another.
            for communicator in shared.all() {
                if let Some(trouble) = communicator.trouble(2 * deadline) {
                    shared.process.fail(&trouble);
                    return;
                }
            }
            drop(shared);
            thread::sleep(LOOK);
        }
    };
    if let Err(error) = thread::Builder::new().name("nccl watch".into()).spawn(looking) {
        shared.process.fail(&format!("no thread that watches NCCL: {error}"));
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
        let connect = move |world: &Arc<Shared>| world.communicator(&id, rank, size);
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
            kinds: RefCell::default(),
            messages: RefCell::default(),
        }))
    }
}
