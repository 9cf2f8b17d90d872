//! Streams beside a GPU's own, and marks on them.

use std::ffi::c_void;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult, CUstream, CUstream_flags};

use super::device::Cuda;
use super::driver::cu;
use crate::Result;

/// A stream beside the one on which a [`Cuda`] orders its work, for work that others put there, such as transfers between GPUs: it
/// goes on beside kernels, in the order that marks say ([`SideStream::follow`], [`Cuda::follow`]).
///
/// Memory belongs to the GPU's own stream: what a side stream reads or writes has to be held until the GPU follows a mark behind it.
#[derive(Debug)]
pub struct SideStream {
    gpu: Cuda,
    stream: CUstream,
}

// SAFETY: handles of the driver may be used on any thread on which the context is current.
unsafe impl Send for SideStream {}
// SAFETY: as above; the driver locks a stream itself.
unsafe impl Sync for SideStream {}

impl SideStream {
    /// A stream of the highest priority: its blocks go first where multiprocessors become free.
    pub fn new(gpu: &Cuda) -> Result<Self> {
        gpu.bind()?;
        let (mut stream, mut least, mut greatest) = (std::ptr::null_mut(), 0, 0);
        // SAFETY: pointers are valid for writing; the context is current.
        unsafe {
            cu!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            let kind = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            cu!(cuStreamCreateWithPriority(&mut stream, kind, greatest))?;
        }
        Ok(SideStream { gpu: gpu.clone(), stream })
    }

    /// What is put on this stream from now on begins when a stream has come to `mark`. Does not wait.
    pub fn follow(&self, mark: &Mark) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as the mark, the stream as long as this.
        unsafe { cu!(cuStreamWaitEvent(self.stream, mark.event, 0)) }
    }

    /// Marks where this stream is now.
    pub fn mark(&self) -> Result<Mark> {
        Mark::on(&self.gpu, self.stream)
    }

    /// The driver's handle (`CUstream`, `cudaStream_t`) for libraries that put work on the stream; it lives as long as this. Their
    /// calls want the context on their thread: [`Cuda::make_current`].
    pub fn handle(&self) -> *mut c_void {
        self.stream.cast()
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: it was created in `new`; the driver lets go of it when its work is done.
            let _ = unsafe { cu!(cuStreamDestroy_v2(self.stream)) };
        }
    }
}

impl Cuda {
    /// Marks where this GPU's own stream is now.
    pub fn mark(&self) -> Result<Mark> {
        Mark::on(self, self.stream())
    }

    /// What is put on this GPU's own stream from now on begins when a side stream has come to `mark`. Does not wait.
    pub fn follow(&self, mark: &Mark) -> Result<()> {
        self.bind()?;
        // SAFETY: the event lives as long as the mark, the stream as long as the GPU's handle.
        unsafe { cu!(cuStreamWaitEvent(self.stream(), mark.event, 0)) }
    }
}

/// A place on a stream of a GPU, of its own or a [`SideStream`].
#[derive(Debug)]
pub struct Mark {
    gpu: Cuda,
    event: CUevent,
}

// SAFETY: handles of the driver may be used on any thread on which the context is current.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    fn on(gpu: &Cuda, stream: CUstream) -> Result<Self> {
        gpu.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is valid for writing.
        unsafe { cu!(cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32))? };
        // Destroys the event also where it cannot be recorded.
        let mark = Mark { gpu: gpu.clone(), event };
        // SAFETY: the event lives as long as the mark; the caller's stream is alive.
        unsafe { cu!(cuEventRecord(event, stream))? };
        Ok(mark)
    }

    /// Whether the stream has come here. Does not wait.
    pub fn is_reached(&self) -> Result<bool> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this.
        match unsafe { cudarc::driver::sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => super::driver::check("cuEventQuery", result).map(|()| true),
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: it was created in `on`; the driver lets go of it when it is reached.
            let _ = unsafe { cu!(cuEventDestroy_v2(self.event)) };
        }
    }
}
