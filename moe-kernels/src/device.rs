//! Memory of one device.

use std::fmt::Debug;
use std::ops::Range;

use crate::Result;

/// Bytes in use and their high-water mark.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes of live buffers.
    pub live: usize,
    /// The most `live` has been since creation or the last [`Device::reset_peak`].
    pub peak: usize,
}

/// Untyped memory, a home stream, and an allocator ordered with that stream.
///
/// A handle is cheap to clone; clones share the allocator and its counters. Buffers are bytes, which gives one
/// allocator, one wire format and object-safe communicators; [`Tensor`](crate::Tensor) adds type and shape.
pub trait Device: Clone + Debug + Send + Sync + 'static {
    /// An owned allocation, freed on drop.
    type Buf: Debug + Send + Sync + 'static;

    /// Allocates `bytes` bytes of unspecified content.
    fn alloc(&self, bytes: usize) -> Result<Self::Buf>;
    /// Allocates `bytes` bytes that are 0. A device whose fresh memory is 0 anyway need not touch it, so that what is never
    /// written takes no memory there.
    fn alloc_zeroed(&self, bytes: usize) -> Result<Self::Buf> {
        let mut buf = self.alloc(bytes)?;
        self.zero(&mut buf, 0..bytes)?;
        Ok(buf)
    }
    /// Length of a buffer in bytes, as asked for.
    fn byte_len(buf: &Self::Buf) -> usize;
    /// Sets a byte range to zero.
    fn zero(&self, buf: &mut Self::Buf, bytes: Range<usize>) -> Result<()>;
    /// Copies host bytes to `dst` from byte `at` on.
    fn upload(&self, dst: &mut Self::Buf, at: usize, src: &[u8]) -> Result<()>;
    /// Copies bytes from `at` on to the host, and waits for them. As [`Device::synchronize`], it may return what earlier kernels found.
    fn download(&self, src: &Self::Buf, at: usize, dst: &mut [u8]) -> Result<()>;
    /// Copies `from` of `src` to `dst` from byte `at` on.
    fn copy(&self, dst: &mut Self::Buf, at: usize, src: &Self::Buf, from: Range<usize>) -> Result<()>;
    /// Waits until all work issued so far is done. On a device whose calls do not wait, an error that a kernel found in its data
    /// comes here, once.
    fn synchronize(&self) -> Result<()>;
    /// Bytes in use and their peak.
    fn memory(&self) -> MemoryStats;
    /// Sets the peak to what is live now.
    fn reset_peak(&self);
}
