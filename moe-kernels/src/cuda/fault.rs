//! What kernels find wrong in their data.

use super::driver::cu;
use cudarc::driver::sys::{CUdeviceptr, CUstream};

use crate::{Error, Result};

/// What a kernel may report, with a row.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    /// A value that is not a number, or not finite.
    NotANumber,
    /// A `what` of the row is not below `end`.
    Index { what: &'static str, end: usize },
    /// Anything else; `what` is the sentence.
    Argument { what: &'static str },
}

impl Fault {
    fn error(self, kernel: &'static str, row: usize) -> Error {
        match self {
            Fault::NotANumber => Error::NotANumber { kernel, row },
            Fault::Index { what, end } => {
                Error::Argument { kernel, what: format!("{what} of row {row} is not below {end}") }
            }
            Fault::Argument { what } => Error::Argument { kernel, what: format!("{what} (at {row})") },
        }
    }
}

/// Bits of a fault word that hold the row; those above hold the launch.
const ROW_BITS: u32 = 40;
/// Launches that can be told apart between two checks.
const LAUNCHES: usize = 1 << 23;
/// The word while nothing is wrong.
const NOTHING: u64 = u64::MAX;

/// What a kernel takes for a [`Fault`]: `struct Fault` of the prelude.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct FaultArgument {
    word: CUdeviceptr,
    code: u64,
}

impl FaultArgument {
    /// As it is passed.
    pub(super) fn words(self) -> [u64; 2] {
        [self.word, self.code]
    }
}

/// The fault word of a device, and which launches may have written it since it was last looked at.
#[derive(Debug)]
pub(super) struct Faults {
    word: CUdeviceptr,
    /// Page-locked.
    host: *mut u64,
    launches: Vec<(&'static str, Fault)>,
}

// SAFETY: the host word belongs to this value alone.
unsafe impl Send for Faults {}

impl Faults {
    /// The word is 8 bytes on the device, the host's copy 8 bytes of page-locked memory.
    pub(super) fn new(word: CUdeviceptr, host: *mut u64, stream: CUstream) -> Result<Self> {
        let faults = Faults { word, host, launches: Vec::new() };
        faults.reset(stream)?;
        Ok(faults)
    }

    fn reset(&self, stream: CUstream) -> Result<()> {
        // SAFETY: the word is 8 bytes of the device.
        unsafe { cu!(cuMemsetD8Async(self.word, 0xff, size_of::<u64>(), stream)) }
    }

    /// What the next launch takes for `fault`.
    pub(super) fn argument(&mut self, kernel: &'static str, fault: Fault) -> FaultArgument {
        let code = self.launches.len() as u64;
        self.launches.push((kernel, fault));
        FaultArgument { word: self.word, code: code << ROW_BITS }
    }

    /// True once no further launch can be told apart.
    pub(super) fn is_full(&self) -> bool {
        self.launches.len() + 8 >= LAUNCHES
    }

    /// Copies the word to the host behind all launches so far, if any can have written it; [`Faults::take`] must follow
    /// once the stream has come there, with no launch between.
    pub(super) fn fetch(&self, stream: CUstream) -> Result<()> {
        if self.launches.is_empty() {
            return Ok(());
        }
        // SAFETY: both are 8 bytes and live as long as the device.
        unsafe { cu!(cuMemcpyDtoHAsync_v2(self.host.cast(), self.word, size_of::<u64>(), stream)) }
    }

    /// The fault that was found, if any; the word is then as new.
    pub(super) fn take(&mut self, stream: CUstream) -> Result<()> {
        if self.launches.is_empty() {
            return Ok(());
        }
        // SAFETY: the copy that `fetch` began is complete.
        let word = unsafe { self.host.read() };
        let launches = std::mem::take(&mut self.launches);
        if word == NOTHING {
            return Ok(());
        }
        self.reset(stream)?;
        let row = (word & ((1 << ROW_BITS) - 1)) as usize;
        Err(match launches.get((word >> ROW_BITS) as usize) {
            Some((kernel, fault)) => fault.error(kernel, row),
            None => {
                Error::Argument { kernel: "fault word", what: format!("no launch has the code of {word:#x}") }
            }
        })
    }
}
