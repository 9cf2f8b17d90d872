//! Ranks as processes, each with a GPU.

use std::env;
use std::time::Duration;

use moe_comm::NcclWorld;
use moe_comm::processes::Hub;
use moe_kernels::{Backend, Cuda, Float, cuda};

use super::line::{Line, of_rank};
use super::place::{self, Place, shares_gpus};
use super::ranks::Job;
use super::{ProcessError, launch};
use crate::Result;
use crate::config::TrainConfig;

/// How long ranks may take to end after one has failed.
const GRACE: Duration = Duration::from_secs(30);

/// What the environment of this process says.
pub(super) fn place(world_size: usize) -> Result<Option<Place>> {
    Ok(Place::find(world_size, variable)?)
}

fn variable(name: &str) -> Option<String> {
    env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn deadline(train: &TrainConfig) -> Duration {
    Duration::from_secs_f64(train.deadline_seconds)
}

/// Runs this program once for each rank, with the arguments that it has itself, and waits until all have ended.
///
/// # Errors
/// There is no CUDA or no NCCL, there are fewer GPUs than ranks, or a rank fails.
pub(super) fn start(world_size: usize, train: &TrainConfig) -> Result<()> {
    let (gpus, share) = (cuda::probe()?, shares_gpus(variable)?);
    NcclWorld::probe()?;
    if gpus < world_size && !(share && gpus > 0) {
        return Err(ProcessError::Gpus { ranks: world_size, gpus }.into());
    }
    let hub = Hub::listen("127.0.0.1:0", world_size, deadline(train))?;
    let variables = |rank: usize| {
        let mut variables = vec![
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", world_size.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            (place::HUB, hub.address().to_string()),
        ];
        if share {
            // NCCL refuses two ranks on one GPU of one host.
            variables.push(("NCCL_HOSTID", format!("rank-{rank}")));
        }
        variables
    };
    // Ctrl-C reaches the ranks, too, which save and end. The second ends them at once.
    if let Err(error) = ctrlc::set_handler(|| {}) {
        eprintln!("warning: Ctrl-C will not save: {error}");
    }
    let (program, arguments): (_, Vec<_>) = (env::current_exe(), env::args_os().skip(1).collect());
    let program = program.unwrap_or_else(|_| env::args_os().next().unwrap_or_default().into());
    let ranks = launch::Ranks::start(&program, &arguments, (0..world_size).map(variables).collect())?;
    let failure = || match hub.failure()? {
        error @ moe_comm::Error::Poisoned { rank, .. } => Some((rank, error.to_string())),
        _ => None,
    };
    Ok(ranks.wait(GRACE, failure)?)
}

/// The rank of this process.
pub(super) struct Rank {
    line: Line,
    device: Cuda,
}

impl Rank {
    /// Takes `place` among `world_size` ranks. All have their GPU when this returns.
    ///
    /// # Errors
    /// NCCL is missing, a rank has no GPU, or one does not come.
    pub fn join(place: Place, world_size: usize, train: &TrainConfig) -> Result<Self> {
        let gpu = || {
            NcclWorld::probe()?;
            Ok(place.gpu(cuda::probe()?, shares_gpus(variable)?)?)
        };
        let gpu = gpu().map_err(|error| of_rank(&place, error))?;
        let line = Line::join(place, world_size, deadline(train))?;
        let device = line.all(Cuda::new(gpu).map_err(Into::into))?;
        Ok(Rank { line, device })
    }

    pub fn line(&self) -> &Line {
        &self.line
    }

    pub fn device(&self) -> &Cuda {
        &self.device
    }

    /// What `job` comes to on this rank, if it is the first.
    pub fn run<T: Float, J: Job>(self, job: J) -> Result<Vec<J::Outcome>>
    where
        Cuda: Backend<T>,
    {
        let Rank { line, device } = self;
        let own = device.clone();
        line.run(|process| NcclWorld::run(process, device, move |world| job.run::<T, Cuda>(world, own)))
    }
}
