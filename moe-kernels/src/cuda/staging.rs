//! Page-locked memory of the host through which copies go, so that an upload need not wait for its source.

use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::{self, CUdeviceptr, CUevent, CUevent_flags, CUresult, CUstream};

use super::driver::cu;
use crate::Result;

/// Bytes that are staged at once; a larger upload goes chunk by chunk, a larger download to its destination.
pub(super) const CHUNK: usize = 512 << 10;
/// Uploads that may be on their way: more than a pass of some layers has, so that it waits for none.
const CHUNKS: usize = 32;

/// A ring of chunks for uploads, one for downloads, and a word for faults.
#[derive(Debug)]
pub(super) struct Staging {
    base: *mut u8,
    events: [CUevent; CHUNKS],
    next: usize,
}

// SAFETY: the memory belongs to this value alone, and handles of the driver may be used on any thread.
unsafe impl Send for Staging {}

impl Staging {
    /// In the current context.
    pub(super) fn new() -> Result<Self> {
        let mut base = std::ptr::null_mut();
        let mut events = [std::ptr::null_mut(); CHUNKS];
        // SAFETY: the pointers are valid for writing.
        unsafe {
            cu!(cuMemAllocHost_v2(&mut base, (CHUNKS + 1) * CHUNK + size_of::<u64>()))?;
            for event in &mut events {
                cu!(cuEventCreate(event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32))?;
            }
        }
        Ok(Staging { base: base.cast(), events, next: 0 })
    }

    /// The word for faults.
    pub(super) fn word(&self) -> *mut u64 {
        // SAFETY: it lies behind all chunks, which are a multiple of its size.
        unsafe { self.base.add((CHUNKS + 1) * CHUNK).cast() }
    }

    /// Begins the copy to the device; `from` may change afterwards. Waits only while all chunks are on their way, which `waits` counts.
    ///
    /// # Safety
    ///
    /// `to` is the start of as many bytes on the device of `stream`, whose context is current.
    pub(super) unsafe fn upload(
        &mut self,
        to: CUdeviceptr,
        from: &[u8],
        stream: CUstream,
        waits: &AtomicU64,
    ) -> Result<()> {
        for (i, part) in from.chunks(CHUNK).enumerate() {
            let (event, at) = (self.events[self.next], self.next * CHUNK);
            self.next = (self.next + 1) % CHUNKS;
            // SAFETY: the event says that nothing reads the chunk any more (one that was never recorded is complete); the rest is the
            // caller's promise.
            unsafe {
                if sys::cuEventQuery(event) == CUresult::CUDA_ERROR_NOT_READY {
                    waits.fetch_add(1, Ordering::Relaxed);
                }
                cu!(cuEventSynchronize(event))?;
                let chunk = self.base.add(at);
                chunk.copy_from_nonoverlapping(part.as_ptr(), part.len());
                cu!(cuMemcpyHtoDAsync_v2(to + (i * CHUNK) as u64, chunk.cast(), part.len(), stream))?;
                cu!(cuEventRecord(event, stream))?;
            }
        }
        Ok(())
    }

    /// Begins the copy of at most [`CHUNK`] bytes from the device; [`Staging::downloaded`] has them once the stream has come there.
    ///
    /// # Safety
    ///
    /// As for [`Staging::upload`].
    pub(super) unsafe fn download(
        &mut self,
        from: CUdeviceptr,
        bytes: usize,
        stream: CUstream,
    ) -> Result<()> {
        assert!(bytes <= CHUNK);
        // SAFETY: the last chunk is for this only.
        unsafe { cu!(cuMemcpyDtoHAsync_v2(self.base.add(CHUNKS * CHUNK).cast(), from, bytes, stream)) }
    }

    /// What was downloaded last; the stream has been waited for.
    pub(super) fn downloaded(&self, to: &mut [u8]) {
        assert!(to.len() <= CHUNK);
        // SAFETY: the copy into the last chunk is complete.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(self.base.add(CHUNKS * CHUNK), to.len()) };
    }

    /// Frees everything.
    ///
    /// # Safety
    ///
    /// No copy is on its way, and nothing is called afterwards.
    pub(super) unsafe fn destroy(&mut self) {
        for event in self.events {
            // SAFETY: it was created in `new`.
            let _ = unsafe { cu!(cuEventDestroy_v2(event)) };
        }
        // SAFETY: as above.
        let _ = unsafe { cu!(cuMemFreeHost(self.base.cast())) };
    }
}
