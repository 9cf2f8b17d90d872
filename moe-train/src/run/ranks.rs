//! Where ranks compute: threads of this process, or a GPU.

use std::time::Duration;

use moe_comm::{ThreadWorld, World};
use moe_kernels::{Backend, Cpu, Float};

use crate::Result;
use crate::config::{ConfigError, DeviceKind, RunConfig, TrainConfig, TrainDType};

/// What every rank does, on any device and in any type.
pub(super) trait Job: Send + Sync + 'static {
    /// What it comes to.
    type Outcome: Send + 'static;

    fn run<T: Float, D: Backend<T>>(&self, world: &dyn World<D>, device: D) -> Result<Self::Outcome>;
}

/// Ranks that were found able to compute, before anything else is done.
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
}

impl Ranks {
    /// Those that `config` asks for.
    ///
    /// # Errors
    /// This program has no CUDA, or the machine has none.
    pub fn new(config: &RunConfig) -> Result<Self> {
        let train = &config.train;
        let devices = match train.device {
            DeviceKind::Cpu => Devices::Cpu {
                world_size: config.folding()?.world_size(),
                deadline: Duration::from_secs_f64(train.deadline_seconds),
            },
            DeviceKind::Cuda => cuda(train)?,
        };
        Ok(Ranks { devices, dtype: train.dtype })
    }

    /// What the data sheet says of each rank's device in the type that it computes in; none where it is not known.
    pub fn peak_tflops(&self) -> Option<f64> {
        match (&self.devices, self.dtype) {
            #[cfg(feature = "cuda")]
            (Devices::Cuda(device), TrainDType::Bf16) => crate::metrics::peak_bf16_tflops(device.name()),
            _ => None,
        }
    }

    /// Whether they compute on GPUs.
    pub fn on_gpu(&self) -> bool {
        !matches!(self.devices, Devices::Cpu { .. })
    }

    /// What all ranks come to, in their order.
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
fn cuda(train: &TrainConfig) -> Result<Devices> {
    let device = moe_kernels::Cuda::new(0)?;
    device.set_deterministic(train.deterministic);
    if train.dtype == TrainDType::Bf16
        && let Err(why) = device.cudnn_version()
    {
        eprintln!("warning: attention runs on kernels of moe-kernels alone: {why}");
    }
    Ok(Devices::Cuda(device))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: &TrainConfig) -> Result<Devices> {
    Err(ConfigError::Conflict {
        setting: "train.device = \"cuda\"",
        problem: "cannot be used",
        other: "a moe-train that was built without its feature cuda".to_owned(),
        fix: "build it with `cargo build --release --features cuda`, for which no CUDA is needed".to_owned(),
    }
    .into())
}
