//! Where ranks compute: threads of this process, or GPUs.

use std::time::Duration;

use moe_comm::{ThreadWorld, World};
use moe_kernels::{Backend, Cpu, Float};
use serde::Serialize;
use serde::de::DeserializeOwned;

#[cfg(feature = "cuda")]
use super::processes;
use crate::Result;
use crate::config::{ConfigError, DeviceKind, RunConfig, TrainDType};

/// What every rank does, on any device and in any type.
pub(super) trait Job: Send + Sync + 'static {
    /// What it comes to.
    type Outcome: Send + 'static;

    fn run<T: Float, D: Backend<T>>(&self, world: &dyn World<D>, device: D) -> Result<Self::Outcome>;
}

/// Ranks that were found able to compute, before anything else is done: all of them, or that of this process.
pub(super) struct Ranks {
    devices: Devices,
    dtype: TrainDType,
}

enum Devices {
    /// Ranks as threads, the machine's cores shared among them.
    Cpu { world_size: usize, deadline: Duration },
    /// One rank.
    #[cfg(feature = "cuda")]
    Cuda(moe_kernels::Cuda),
    /// One of several.
    #[cfg(feature = "cuda")]
    Process(processes::Rank),
}

impl Ranks {
    /// Those that `config` asks for.
    ///
    /// # Errors
    /// This program has no CUDA, or the machine has none; this process is none of the ranks, or others do not come.
    pub fn new(config: &RunConfig) -> Result<Self> {
        let train = &config.train;
        let world_size = config.folding()?.world_size();
        let devices = match train.device {
            DeviceKind::Cpu => {
                Devices::Cpu { world_size, deadline: Duration::from_secs_f64(train.deadline_seconds) }
            }
            DeviceKind::Cuda => gpus(config, world_size)?,
        };
        Ok(Ranks { devices, dtype: train.dtype })
    }

    /// Starts those that are processes, if this is none of them, and waits until they have ended.
    pub fn launch(config: &RunConfig) -> Result<bool> {
        match config.train.device {
            DeviceKind::Cpu => Ok(false),
            DeviceKind::Cuda => launch(config),
        }
    }

    /// What the data sheet says of each rank's device in the type that it computes in; none where it is not known.
    pub fn peak_tflops(&self) -> Option<f64> {
        match (&self.devices, self.dtype) {
            #[cfg(feature = "cuda")]
            (Devices::Cuda(device), TrainDType::Bf16) => crate::metrics::peak_bf16_tflops(device.name()),
            #[cfg(feature = "cuda")]
            (Devices::Process(rank), TrainDType::Bf16) => {
                crate::metrics::peak_bf16_tflops(rank.device().name())
            }
            _ => None,
        }
    }

    /// Whether they compute on GPUs.
    pub fn on_gpu(&self) -> bool {
        !matches!(self.devices, Devices::Cpu { .. })
    }

    /// Whether this process speaks for all ranks: it has the first.
    pub fn has_first(&self) -> bool {
        match &self.devices {
            #[cfg(feature = "cuda")]
            Devices::Process(rank) => rank.line().is_first(),
            _ => true,
        }
    }

    /// What `first` makes, in the process of the first rank alone. In those of others, which wait for it, what `other` makes of
    /// the part that is told to them.
    pub fn begin<S, O>(
        &self,
        first: impl FnOnce() -> Result<(S, O)> + Send,
        other: impl FnOnce(&S) -> Result<O>,
    ) -> Result<(S, O)>
    where
        S: Serialize + DeserializeOwned + Send,
        O: Send,
    {
        match &self.devices {
            #[cfg(feature = "cuda")]
            Devices::Process(rank) => rank.line().begin(first, other),
            // Threads share it.
            _ => {
                drop(other);
                first()
            }
        }
    }

    /// What the ranks come to, in their order; of processes, the first alone, in its own.
    pub fn run<J: Job>(self, job: J) -> Result<Vec<J::Outcome>> {
        match self.devices {
            Devices::Cpu { world_size, deadline } => match self.dtype {
                TrainDType::F32 => threads::<f32, J>(world_size, deadline, job),
                TrainDType::F64 => threads::<f64, J>(world_size, deadline, job),
                TrainDType::Bf16 => Err(ConfigError::bf16_on_cpu().into()),
            },
            #[cfg(feature = "cuda")]
            Devices::Cuda(device) => {
                let world = moe_comm::SoloWorld::new(device.clone());
                Ok(vec![match self.dtype {
                    TrainDType::F32 => job.run::<f32, _>(&world, device)?,
                    TrainDType::F64 => job.run::<f64, _>(&world, device)?,
                    TrainDType::Bf16 => job.run::<moe_kernels::bf16, _>(&world, device)?,
                }])
            }
            #[cfg(feature = "cuda")]
            Devices::Process(rank) => match self.dtype {
                TrainDType::F32 => rank.run::<f32, J>(job),
                TrainDType::F64 => rank.run::<f64, J>(job),
                TrainDType::Bf16 => rank.run::<moe_kernels::bf16, J>(job),
            },
        }
    }
}

fn threads<T: Float, J: Job>(world_size: usize, deadline: Duration, job: J) -> Result<Vec<J::Outcome>>
where
    Cpu: Backend<T>,
{
    let threads = super::threads(world_size);
    Ok(ThreadWorld::run(world_size, deadline, move |world| job.run::<T, Cpu>(&world, Cpu::new(threads)))?)
}

#[cfg(feature = "cuda")]
fn gpus(config: &RunConfig, world_size: usize) -> Result<Devices> {
    let train = &config.train;
    let devices = match (processes::place(world_size)?, world_size) {
        (Some(place), _) => Devices::Process(processes::Rank::join(place, world_size, train)?),
        (None, 1) => Devices::Cuda(moe_kernels::Cuda::new(0)?),
        (None, _) => return Err(super::ProcessError::NoRank { world_size }.into()),
    };
    let (device, first) = match &devices {
        Devices::Process(rank) => (rank.device(), rank.line().is_first()),
        Devices::Cuda(device) => (device, true),
        Devices::Cpu { .. } => return Ok(devices),
    };
    device.set_deterministic(train.deterministic);
    if first
        && train.dtype == TrainDType::Bf16
        && let Err(why) = device.cudnn_version()
    {
        eprintln!("warning: attention runs on kernels of moe-kernels alone: {why}");
    }
    Ok(devices)
}

#[cfg(feature = "cuda")]
fn launch(config: &RunConfig) -> Result<bool> {
    let world_size = config.parallel.world_size;
    let launches = processes::place(world_size)?.is_none() && world_size > 1;
    if launches {
        processes::start(world_size, &config.train)?;
    }
    Ok(launches)
}

#[cfg(not(feature = "cuda"))]
fn launch(_: &RunConfig) -> Result<bool> {
    Ok(false)
}

#[cfg(not(feature = "cuda"))]
fn gpus(_: &RunConfig, _: usize) -> Result<Devices> {
    Err(ConfigError::Conflict {
        setting: "train.device = \"cuda\"",
        problem: "cannot be used",
        other: "a moe-train that was built without its feature cuda".to_owned(),
        fix: "build it with `cargo build --release --features cuda`, for which no CUDA is needed".to_owned(),
    }
    .into())
}
