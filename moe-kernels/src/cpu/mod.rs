//! The backend of every machine.

mod device;

pub use device::{Cpu, CpuBuf};
