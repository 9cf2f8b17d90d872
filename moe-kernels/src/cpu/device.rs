//! Memory of the host as a device.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::{Device, Error, MemoryStats, Result, check};

/// The host: kernels on one thread, or on a pool of threads that this handle and its clones own.
///
/// Results depend neither on timing nor on the number of threads: the same calls give the same bits.
#[derive(Clone)]
pub struct Cpu {
    allocator: Arc<Allocator>,
    threads: Arc<Threads>,
}

/// A pool that starts with the first kernel that needs it.
struct Threads {
    count: usize,
    pool: OnceLock<Result<rayon::ThreadPool>>,
}

impl Cpu {
    /// A device whose kernels use `threads` threads. With one thread (or zero, which counts as one) kernels run
    /// on the calling thread and no pool ever exists, as thread-ranks want it.
    ///
    /// The threads start with the first kernel; it returns [`Error::Threads`] if the system has none left.
    pub fn new(threads: usize) -> Self {
        Self::build(threads, false)
    }

    /// As [`Cpu::new`], with fresh memory filled with NaN (integers: −1), so that a test sees a kernel that reads
    /// what it should overwrite.
    pub fn poisoned(threads: usize) -> Self {
        Self::build(threads, true)
    }

    fn build(threads: usize, poison: bool) -> Self {
        Cpu {
            allocator: Arc::new(Allocator { poison, state: Mutex::default(), waits: AtomicU64::new(0) }),
            threads: Arc::new(Threads { count: threads.max(1), pool: OnceLock::new() }),
        }
    }

    /// Number of threads that kernels use.
    pub fn threads(&self) -> usize {
        self.threads.count
    }

    /// How often the host has read its memory as that of a device, or has waited for it: downloads and synchronisations of all
    /// clones so far. They cost nothing here, but on a device whose calls do not wait each one does.
    pub fn waits(&self) -> u64 {
        self.allocator.waits.load(Ordering::Relaxed)
    }

    /// The threads beside the calling one; none with one thread.
    pub(super) fn pool(&self) -> Result<Option<&rayon::ThreadPool>> {
        let threads = self.threads.count;
        if threads == 1 {
            return Ok(None);
        }
        let start = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads - 1)
                .thread_name(|i| format!("cpu-kernel-{i}"))
                .build()
                .map_err(|e| Error::Threads { threads, reason: e.to_string() })
        };
        self.threads.pool.get_or_init(start).as_ref().map(Some).map_err(Error::clone)
    }
}

/// All cores.
impl Default for Cpu {
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, NonZeroUsize::get))
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu").field("threads", &self.threads()).field("memory", &self.memory()).finish()
    }
}

/// Bytes of host memory, aligned to cache lines; dropped, they return to the allocator they came from.
pub struct CpuBuf {
    block: Block,
    bytes: usize,
    allocator: Arc<Allocator>,
}

impl CpuBuf {
    /// All bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.block.words[self.block.start..])[..self.bytes]
    }

    /// All bytes, to write.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.block.words[self.block.start..])[..self.bytes]
    }

    /// All whole elements of type `T` that fit.
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        let whole = self.bytes - self.bytes % size_of::<T>().max(1);
        bytemuck::cast_slice(&self.as_bytes()[..whole])
    }

    /// All whole elements of type `T` that fit, to write.
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let whole = self.bytes - self.bytes % size_of::<T>().max(1);
        bytemuck::cast_slice_mut(&mut self.as_bytes_mut()[..whole])
    }
}

impl fmt::Debug for CpuBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuBuf").field("bytes", &self.bytes).finish()
    }
}

impl Drop for CpuBuf {
    fn drop(&mut self) {
        self.allocator.give_back(std::mem::take(&mut self.block), self.bytes);
    }
}

/// Words of 16 bytes of which those from `start` on begin a cache line.
#[derive(Default)]
struct Block {
    words: Box<[u128]>,
    start: usize,
}

const WORD: usize = size_of::<u128>();
const LINE: usize = 64;
/// Blocks of so many bytes and more go back to the system: between the passes of a step, the gradients of a large layer
/// are to leave room for what else is large, and fresh pages cost little beside the work on so many elements.
const LARGE: usize = 64 << 20;

impl Block {
    /// Of zeros, which take no memory before they are written; `None` if the system has none left.
    fn new(bytes: usize) -> Option<Block> {
        let len = bytes / WORD + (LINE / WORD - 1);
        let words: Box<[u128]> = bytemuck::allocation::try_zeroed_slice_box(len).ok()?;
        let start = words.as_ptr().align_offset(LINE);
        Some(Block { words, start })
    }
}

/// Keeps freed blocks by size class, unless they are [`LARGE`], because fresh pages are far dearer than used ones.
struct Allocator {
    poison: bool,
    state: Mutex<State>,
    waits: AtomicU64,
}

#[derive(Default)]
struct State {
    free: HashMap<usize, Vec<Block>>,
    stats: MemoryStats,
}

/// Bytes of the size class: four classes to an octave, so that at most a fifth is unused.
fn size_class(bytes: usize) -> Option<usize> {
    let step = (bytes.max(LINE).checked_next_power_of_two()? / 8).max(LINE);
    bytes.max(1).checked_next_multiple_of(step)
}

impl Allocator {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Counters and free lists are consistent after every statement below: a panic elsewhere harms nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer, and whether its block is fresh, which is all zeros.
    fn take(self: &Arc<Self>, bytes: usize) -> Result<(CpuBuf, bool)> {
        let mut state = self.lock();
        let out_of_memory = Error::OutOfMemory { requested: bytes, live: state.stats.live };
        let Some(class) = size_class(bytes) else { return Err(out_of_memory) };
        let kept = state.free.get_mut(&class).and_then(Vec::pop);
        let fresh = kept.is_none();
        let block = match kept.or_else(|| Block::new(class)) {
            Some(block) => block,
            None => {
                state.free.clear();
                Block::new(class).ok_or(out_of_memory)?
            }
        };
        state.stats.live += bytes;
        state.stats.peak = state.stats.peak.max(state.stats.live);
        drop(state);
        Ok((CpuBuf { block, bytes, allocator: self.clone() }, fresh))
    }

    fn give_back(&self, block: Block, bytes: usize) {
        let mut state = self.lock();
        state.stats.live -= bytes;
        if let Some(class) = size_class(bytes).filter(|&class| class < LARGE) {
            state.free.entry(class).or_default().push(block);
        }
    }
}

impl Device for Cpu {
    type Buf = CpuBuf;

    fn alloc(&self, bytes: usize) -> Result<CpuBuf> {
        let (mut buf, _) = self.allocator.take(bytes)?;
        if self.allocator.poison {
            buf.as_bytes_mut().fill(0xff);
        }
        Ok(buf)
    }

    fn alloc_zeroed(&self, bytes: usize) -> Result<CpuBuf> {
        let (mut buf, fresh) = self.allocator.take(bytes)?;
        if !fresh {
            buf.as_bytes_mut().fill(0);
        }
        Ok(buf)
    }

    fn byte_len(buf: &CpuBuf) -> usize {
        buf.bytes
    }

    fn zero(&self, buf: &mut CpuBuf, bytes: Range<usize>) -> Result<()> {
        let range = check::bytes(bytes, buf.bytes)?;
        buf.as_bytes_mut()[range].fill(0);
        Ok(())
    }

    fn upload(&self, dst: &mut CpuBuf, at: usize, src: &[u8]) -> Result<()> {
        let range = check::bytes(at..at.saturating_add(src.len()), dst.bytes)?;
        dst.as_bytes_mut()[range].copy_from_slice(src);
        Ok(())
    }

    fn download(&self, src: &CpuBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        let range = check::bytes(at..at.saturating_add(dst.len()), src.bytes)?;
        self.allocator.waits.fetch_add(1, Ordering::Relaxed);
        dst.copy_from_slice(&src.as_bytes()[range]);
        Ok(())
    }

    fn copy(&self, dst: &mut CpuBuf, at: usize, src: &CpuBuf, from: Range<usize>) -> Result<()> {
        let from = check::bytes(from, src.bytes)?;
        let to = check::bytes(at..at.saturating_add(from.len()), dst.bytes)?;
        dst.as_bytes_mut()[to].copy_from_slice(&src.as_bytes()[from]);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.allocator.waits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn memory(&self) -> MemoryStats {
        self.allocator.lock().stats
    }

    fn reset_peak(&self) {
        let mut state = self.allocator.lock();
        state.stats.peak = state.stats.live;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_ordered_and_waste_little() {
        for bytes in 0..100_000 {
            let class = size_class(bytes).unwrap();
            assert!(class >= bytes && class.is_multiple_of(LINE));
            assert!(bytes < 512 || class * 4 <= bytes * 5, "{bytes} -> {class}");
            assert_eq!(size_class(class), Some(class));
        }
        assert_eq!(size_class(usize::MAX), None);
    }

    #[test]
    fn blocks_are_reused_and_counted_as_asked_for() {
        let cpu = Cpu::new(1);
        let a = cpu.alloc(1000).unwrap();
        let at = a.as_bytes().as_ptr();
        assert_eq!(at.align_offset(LINE), 0);
        assert_eq!(cpu.memory(), MemoryStats { live: 1000, peak: 1000 });
        drop(a);
        let b = cpu.clone().alloc(1010).unwrap();
        assert_eq!(b.as_bytes().as_ptr(), at);
        assert_eq!(b.as_bytes().len(), 1010);
        assert_eq!(cpu.memory(), MemoryStats { live: 1010, peak: 1010 });
        drop(b);
        cpu.reset_peak();
        assert_eq!(cpu.memory(), MemoryStats::default());
    }

    #[test]
    fn zeros_are_zeros_in_fresh_blocks_and_in_used_ones() {
        for cpu in [Cpu::new(1), Cpu::poisoned(1)] {
            for _ in 0..2 {
                let mut a = cpu.alloc_zeroed(1000).unwrap();
                assert!(a.as_bytes().iter().all(|&byte| byte == 0));
                a.as_bytes_mut().fill(7);
            }
        }
    }

    #[test]
    fn reads_are_counted() {
        let cpu = Cpu::new(1);
        let mut a = cpu.alloc(8).unwrap();
        cpu.upload(&mut a, 0, &[1; 8]).unwrap();
        assert_eq!(cpu.waits(), 0);
        cpu.download(&a, 0, &mut [0; 8]).unwrap();
        cpu.clone().synchronize().unwrap();
        assert_eq!(cpu.waits(), 2);
    }

    #[test]
    fn large_blocks_are_not_kept() {
        let cpu = Cpu::new(1);
        for (bytes, kept) in [(LARGE / 2, 1), (LARGE, 0), (LARGE + 1, 0)] {
            drop(cpu.alloc(bytes).unwrap());
            let state = cpu.allocator.lock();
            assert_eq!(state.free.get(&size_class(bytes).unwrap()).map_or(0, Vec::len), kept, "{bytes}");
            assert_eq!(state.stats.live, 0);
        }
    }

    #[test]
    fn ranges_outside_are_errors() {
        let cpu = Cpu::new(1);
        let mut a = cpu.alloc(8).unwrap();
        let b = cpu.alloc(8).unwrap();
        let outside = |r: Result<()>| assert!(matches!(r, Err(Error::OutOfBounds { len: 8, .. })), "{r:?}");
        outside(cpu.zero(&mut a, 4..9));
        outside(cpu.upload(&mut a, 7, &[0; 2]));
        outside(cpu.upload(&mut a, usize::MAX, &[0; 2]));
        outside(cpu.download(&b, 1, &mut [0; 8]));
        outside(cpu.copy(&mut a, 1, &b, 0..8));
        outside(cpu.copy(&mut a, 0, &b, 1..9));
        assert!(matches!(cpu.alloc(usize::MAX), Err(Error::OutOfMemory { requested: usize::MAX, .. })));
        assert!(matches!(cpu.alloc(usize::MAX / 4), Err(Error::OutOfMemory { .. })));
    }

    #[test]
    fn poisoned_memory_is_nan() {
        let cpu = Cpu::poisoned(1);
        for _ in 0..2 {
            let mut a = cpu.alloc(64).unwrap();
            assert!(a.as_slice::<f32>().iter().all(|x| x.is_nan()));
            assert!(a.as_slice::<f64>().iter().all(|x| x.is_nan()));
            a.as_mut_slice::<f64>().fill(1.0);
        }
    }
}
