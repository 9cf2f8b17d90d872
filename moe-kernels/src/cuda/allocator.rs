//! Memory of a GPU, ordered by its one stream.
//!
//! A block that is freed may be given out at once, since whatever still uses it comes earlier on the stream: nothing waits,
//! neither on allocation nor on free.
//!
//! - Blocks up to [`SMALL`] come from lists of freed blocks by size class, and where there is none from slabs of [`SLAB`] bytes that are
//!   cut from front to back and kept until the device goes.
//! - Larger ones are the driver's: its stream-ordered pool keeps what is freed and joins what lies apart by remapping pages, which lists by
//!   size cannot, and the sizes of routed tokens are new ones at every step.
//! - Where the driver has no memory left, its pool gives back what it keeps, and the allocation is tried once more.

use std::collections::HashMap;

use cudarc::driver::sys::{self, CUdeviceptr, CUmemPool_attribute, CUmemPoolProps, CUmemoryPool, CUstream};

use super::driver::cu;
use crate::{Error, MemoryStats, Result};

/// Blocks up to so many bytes are kept by size class.
pub(super) const SMALL: usize = 1 << 20;
/// Bytes that are cut into small blocks.
const SLAB: usize = 8 << 20;
/// What every block begins at a multiple of, as the driver's own.
const ALIGNMENT: usize = 256;

/// Bytes of the size class: four classes to an octave, so that at most a fifth is unused of what is not tiny.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.max(ALIGNMENT).next_power_of_two() / 8).max(ALIGNMENT);
    bytes.max(1).next_multiple_of(step)
}

/// The allocator of one stream.
#[derive(Debug)]
pub(super) struct Allocator {
    pool: CUmemoryPool,
    stream: CUstream,
    free: HashMap<usize, Vec<CUdeviceptr>>,
    slabs: Vec<CUdeviceptr>,
    /// What is left of the last slab.
    rest: std::ops::Range<CUdeviceptr>,
    pub(super) stats: MemoryStats,
}

// SAFETY: handles of the driver may be used on any thread.
unsafe impl Send for Allocator {}

impl Allocator {
    /// For `device`, whose context is current.
    pub(super) fn new(device: i32, stream: CUstream) -> Result<Self> {
        // SAFETY: a description of zeros is a valid one; what it needs is set.
        let mut properties: CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        // The union of CUDA 13's location is an `int` in CUDA 12's.
        set_location(&mut properties.location, device);
        let mut pool = std::ptr::null_mut();
        let mut keep = u64::MAX;
        // SAFETY: the pointers are valid; the attribute is a `cuuint64_t`.
        unsafe {
            cu!(cuMemPoolCreate(&mut pool, &properties))?;
            cu!(cuMemPoolSetAttribute(
                pool,
                CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut keep).cast()
            ))?;
        }
        let (free, slabs, stats) = Default::default();
        Ok(Allocator { pool, stream, free, slabs, rest: 0..0, stats })
    }

    /// A block of at least `bytes` bytes.
    pub(super) fn take(&mut self, bytes: usize) -> Result<CUdeviceptr> {
        let at = if bytes <= SMALL { self.small(bytes) } else { self.large(bytes) }?;
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        Ok(at)
    }

    fn small(&mut self, bytes: usize) -> Result<CUdeviceptr> {
        let class = size_class(bytes);
        if let Some(at) = self.free.get_mut(&class).and_then(Vec::pop) {
            return Ok(at);
        }
        if self.rest.end - self.rest.start < class as u64 {
            let slab = self.large(SLAB).map_err(|error| match error {
                Error::OutOfMemory { live, .. } => Error::OutOfMemory { requested: bytes, live },
                other => other,
            })?;
            self.slabs.push(slab);
            self.rest = slab..slab + SLAB as u64;
        }
        let at = self.rest.start;
        self.rest.start += class as u64;
        Ok(at)
    }

    fn large(&mut self, bytes: usize) -> Result<CUdeviceptr> {
        let mut at = 0;
        for last in [false, true] {
            // SAFETY: the pointer is valid for writing; pool and stream live as long as this.
            match unsafe { sys::cuMemAllocFromPoolAsync(&mut at, bytes, self.pool, self.stream) } {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY if !last => self.trim()?,
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => break,
                result => return super::driver::check("cuMemAllocFromPoolAsync", result).map(|()| at),
            }
        }
        Err(Error::OutOfMemory { requested: bytes, live: self.stats.live })
    }

    /// Gives back to the driver what its pool keeps.
    fn trim(&mut self) -> Result<()> {
        // SAFETY: as above.
        unsafe {
            cu!(cuStreamSynchronize(self.stream))?;
            cu!(cuMemPoolTrimTo(self.pool, 0))
        }
    }

    /// Takes a block back that was given for `bytes`.
    pub(super) fn give_back(&mut self, at: CUdeviceptr, bytes: usize) {
        self.stats.live -= bytes;
        if bytes <= SMALL {
            self.free.entry(size_class(bytes)).or_default().push(at);
        } else {
            // Where this fails, work before it has: the next call that returns an error says so.
            // SAFETY: the block came from `large`, and is given back once.
            let _ = unsafe { cu!(cuMemFreeAsync(at, self.stream)) };
        }
    }

    /// Frees everything; no block may be in use.
    ///
    /// # Safety
    ///
    /// The context is current, and nothing is called afterwards.
    pub(super) unsafe fn destroy(&mut self) {
        for slab in self.slabs.drain(..) {
            // SAFETY: slabs came from `large`.
            let _ = unsafe { cu!(cuMemFreeAsync(slab, self.stream)) };
        }
        // SAFETY: the pool is this allocator's own.
        let _ = unsafe { cu!(cuMemPoolDestroy(self.pool)) };
    }
}

fn set_location(location: &mut sys::CUmemLocation, device: i32) {
    // SAFETY: in every version of the bindings the location is a 4-byte type followed by a 4-byte device.
    unsafe { std::ptr::from_mut(location).cast::<i32>().add(1).write(device) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_ordered_and_waste_little() {
        let mut last = 0;
        for bytes in 0..=SMALL {
            let class = size_class(bytes);
            assert!(class >= bytes && class >= last && class.is_multiple_of(ALIGNMENT));
            assert!(bytes < 2048 || class * 4 <= bytes * 5, "{bytes} -> {class}");
            last = class;
        }
        assert_eq!(size_class(SMALL), SMALL);
        assert_eq!(SLAB % SMALL, 0);
    }
}
