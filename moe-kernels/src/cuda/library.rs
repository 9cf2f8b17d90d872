//! The libraries that are loaded at run time, and what to say where they are missing.

use std::sync::OnceLock;

use cudarc::driver::sys::CUdevice_attribute;

use super::driver::cu;
use crate::{Error, Result};

/// A library of CUDA.
#[derive(Debug, Clone, Copy)]
pub(super) enum Library {
    /// `libcuda`, which comes with the kernel driver.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Attention.
    Cudnn,
}

impl Library {
    fn name(self) -> &'static str {
        match self {
            Library::Driver => "the CUDA driver (libcuda)",
            Library::Nvrtc => "the CUDA run-time compiler (libnvrtc)",
            Library::CublasLt => "cuBLASLt (libcublasLt)",
            Library::Cudnn => "cuDNN (libcudnn)",
        }
    }

    fn stem(self) -> &'static str {
        match self {
            Library::Driver => "cuda",
            Library::Nvrtc => "nvrtc",
            Library::CublasLt => "cublasLt",
            Library::Cudnn => "cudnn",
        }
    }

    pub(super) fn fix(self) -> &'static str {
        match self {
            Library::Driver => {
                "it comes with NVIDIA's kernel driver, version 550 or later (in a container, start it with the GPU: `--gpus all`)"
            }
            Library::Nvrtc => {
                "it comes with the CUDA toolkit, or by `pip install nvidia-cuda-nvrtc`; add its folder to LD_LIBRARY_PATH"
            }
            Library::CublasLt => {
                "it comes with the CUDA toolkit, or by `pip install nvidia-cublas`; add its folder to LD_LIBRARY_PATH"
            }
            Library::Cudnn => {
                "it comes by `pip install nvidia-cudnn-cu13` (of CUDA 12: `nvidia-cudnn-cu12`); add its folder to LD_LIBRARY_PATH"
            }
        }
    }

    fn is_present(self) -> bool {
        static PRESENT: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
        // SAFETY: loading a library of CUDA runs its initialisers, which have no requirements.
        let look = || unsafe {
            match self {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Cudnn => cudarc::cudnn::sys::is_culib_present(),
            }
        };
        *PRESENT[self as usize].get_or_init(look)
    }

    /// An error unless the library can be loaded. What binds it panics where it is missing, so this comes before its first call.
    pub(super) fn require(self) -> Result<()> {
        if self.is_present() {
            return Ok(());
        }
        let names = cudarc::get_lib_name_candidates(self.stem());
        let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
        let places = if path.is_empty() {
            "the system's library folders (LD_LIBRARY_PATH is not set)".into()
        } else {
            format!("LD_LIBRARY_PATH ({path}) and the system's library folders")
        };
        Err(Error::Library {
            library: self.name(),
            looked_for: format!("no {}, …, {} in {places}", names[0], names[names.len() - 6]),
            fix: self.fix(),
        })
    }
}

/// The oldest driver that has every function used here, as `cuDriverGetVersion` counts: CUDA 12.4.
const DRIVER_VERSION: i32 = 12040;

/// How many CUDA devices this process sees; an error says what is missing where there can be none.
pub fn probe() -> Result<usize> {
    Library::Driver.require()?;
    let (mut version, mut count) = (0, 0);
    // SAFETY: the driver library is there; both pointers are valid for writing.
    unsafe {
        cu!(cuInit(0))?;
        cu!(cuDriverGetVersion(&mut version))?;
        cu!(cuDeviceGetCount(&mut count))?;
    }
    if version < DRIVER_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Unsupported {
            what: format!("a driver for CUDA {major}.{minor}; CUDA 12.4 or later is needed (driver 550)"),
        });
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// An attribute of a device.
pub(super) fn attribute(device: i32, attribute: CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: the pointer is valid for writing; `device` came from the driver.
    unsafe { cu!(cuDeviceGetAttribute(&mut value, attribute, device))? };
    Ok(value)
}
