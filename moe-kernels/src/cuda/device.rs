//! A GPU as a device: its context, its stream, its memory.

use std::ffi::CStr;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice_attribute, CUdeviceptr, CUstream, CUstream_flags};

use super::allocator::Allocator;
use super::cublaslt::Lt;
use super::cudnn::Dnn;
use super::driver::cu;
use super::fault::Faults;
use super::kernel::{Kernel, Kernels};
use super::library::{Library, attribute, probe};
use super::source::Variant;
use super::staging::{CHUNK, Staging};
use crate::{Device, Error, MemoryStats, Result, check};

/// A GPU with one stream, on which all its work is ordered.
///
/// A handle may be used on any thread; clones share the stream and the memory. See the [module](crate::cuda) for when errors come.
#[derive(Clone)]
pub struct Cuda {
    gpu: Arc<Gpu>,
}

struct Gpu {
    ordinal: usize,
    device: i32,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    most_shared: usize,
    context: CUcontext,
    stream: CUstream,
    poison: bool,
    memory: Mutex<Allocator>,
    staging: Mutex<Staging>,
    faults: Mutex<Faults>,
    kernels: Kernels,
    cublaslt: OnceLock<Lt>,
    cudnn: OnceLock<Result<Dnn>>,
    deterministic: AtomicBool,
    waits: AtomicU64,
    interrupted: OnceLock<Arc<str>>,
}

// SAFETY: handles of the driver may be used on any thread on which the context is current; everything else is behind locks.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Bytes of shared memory that are left to what a kernel declares itself.
const DECLARED: usize = 3 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind the locks is whole after every statement: a panic elsewhere harms nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// The GPU `ordinal` of those that this process sees (`CUDA_VISIBLE_DEVICES`), from 0.
    ///
    /// [`Error::Library`] where the driver or the run-time compiler is missing, [`Error::NoDevice`] where there is no such
    /// GPU, [`Error::Unsupported`] below compute capability 8.0 (Ampere).
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::open(ordinal, false)
    }

    /// As [`Cuda::new`], with fresh memory filled with NaN (integers: −1), so that a test sees a kernel that reads what it
    /// should overwrite.
    pub fn poisoned(ordinal: usize) -> Result<Self> {
        Self::open(ordinal, true)
    }

    fn open(ordinal: usize, poison: bool) -> Result<Self> {
        let count = probe()?;
        Library::Nvrtc.require()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let mut device = 0;
        let mut name = [0 as std::ffi::c_char; 128];
        // SAFETY: the driver is there and initialised; pointers are valid for writing; the name ends with a zero.
        let name = unsafe {
            cu!(cuDeviceGet(&mut device, ordinal as i32))?;
            cu!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let capability = (
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            let (major, minor) = capability;
            let what =
                format!("{name} has compute capability {major}.{minor}; 8.0 (Ampere) or later is needed");
            return Err(Error::Unsupported { what });
        }
        let multiprocessors =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: pointers are valid for writing. The context is released when the `Gpu` is dropped; where an error
        // comes before there is one, the process keeps it, as the driver would.
        unsafe {
            cu!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            cu!(cuCtxSetCurrent(context))?;
            cu!(cuStreamCreate(&mut stream, CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        }
        let mut memory = Allocator::new(device, stream)?;
        let staging = Staging::new()?;
        let fault_word = memory.take(size_of::<u64>())?;
        memory.stats = MemoryStats::default();
        let faults = Faults::new(fault_word, staging.word(), stream)?;
        let gpu = Gpu {
            ordinal,
            device,
            name,
            capability,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            most_shared: usize::try_from(shared).unwrap_or(0).saturating_sub(DECLARED),
            context,
            stream,
            poison,
            memory: Mutex::new(memory),
            staging: Mutex::new(staging),
            faults: Mutex::new(faults),
            kernels: Kernels::default(),
            cublaslt: OnceLock::new(),
            cudnn: OnceLock::new(),
            deterministic: AtomicBool::new(true),
            waits: AtomicU64::new(0),
            interrupted: OnceLock::new(),
        };
        Ok(Cuda { gpu: Arc::new(gpu) })
    }

    /// Its number among the GPUs that this process sees.
    pub fn ordinal(&self) -> usize {
        self.gpu.ordinal
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.gpu.name
    }

    /// Its compute capability: `(9, 0)` is Hopper.
    pub fn compute_capability(&self) -> (u32, u32) {
        let (major, minor) = self.gpu.capability;
        (major.unsigned_abs(), minor.unsigned_abs())
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> usize {
        self.gpu.multiprocessors
    }

    /// Bytes of dynamic shared memory that a block may have.
    pub(super) fn most_shared(&self) -> usize {
        self.gpu.most_shared
    }

    /// The version of cuDNN, as in `9.19.0`, that computes attention.
    ///
    /// An error where attention is left to kernels of this crate alone: [`Error::Library`] where cuDNN is missing, [`Error::Unsupported`]
    /// where the GPU is none of Hopper's, or the library too old. Where it fails to begin ([`Error::Driver`]), so does attention that it would
    /// compute.
    pub fn cudnn_version(&self) -> Result<String> {
        self.bind()?;
        self.cudnn().map(Dnn::version)
    }

    /// Whether every result is the same bits each time, which is so unless this is called with `false`; clones share the setting.
    ///
    /// With `false`, the backward of attention may be cuDNN's, which is faster and adds up the gradient of queries in no fixed order.
    pub fn set_deterministic(&self, deterministic: bool) {
        self.gpu.deterministic.store(deterministic, Ordering::Relaxed);
    }

    pub(super) fn is_deterministic(&self) -> bool {
        self.gpu.deterministic.load(Ordering::Relaxed)
    }

    /// How often the host has waited for the stream, all clones together: at every download and synchronisation, and at uploads that found
    /// no room to be staged, since 16 MiB, or 32 uploads of whatever size, were still on their way.
    pub fn waits(&self) -> u64 {
        self.gpu.waits.load(Ordering::Relaxed)
    }

    /// Makes the context current on this thread, for calls of other libraries that work on this GPU.
    pub fn make_current(&self) -> Result<()> {
        self.bind()
    }

    /// From now on every wait for the stream ([`Device::download`], [`Device::synchronize`]) of all clones returns
    /// [`Error::Interrupted`] with `why`, also those under way once the stream has come to where they wait: for whoever finds that what
    /// is on the stream cannot come right any more, as a transfer whose other side is gone. The first reason stays.
    pub fn interrupt(&self, why: &str) {
        self.gpu.interrupted.get_or_init(|| why.into());
    }

    /// Makes the context current on this thread: before every call of the driver or of cuBLASLt.
    pub(super) fn bind(&self) -> Result<()> {
        self.gpu.bind()
    }

    pub(super) fn stream(&self) -> CUstream {
        self.gpu.stream
    }

    pub(super) fn owns(&self, buf: &CudaBuf) -> bool {
        Arc::ptr_eq(&self.gpu, &buf.gpu)
    }

    pub(super) fn load(&self, variant: &Variant, name: &'static str) -> Result<Arc<Kernel>> {
        self.bind()?;
        self.gpu.kernels.get(variant, name, self.gpu.capability)
    }

    /// cuBLASLt, from its first use on; the context is current.
    pub(super) fn cublaslt(&self) -> Result<&Lt> {
        if let Some(lt) = self.gpu.cublaslt.get() {
            return Ok(lt);
        }
        let lt = Lt::new()?;
        Ok(self.gpu.cublaslt.get_or_init(|| lt))
    }

    /// cuDNN, from its first use on; the context is current. That it is missing, or none for this GPU, is remembered; that it could not
    /// begin ([`Error::Driver`]) is not, and may be different the next time.
    pub(super) fn cudnn(&self) -> Result<&Dnn> {
        if let Some(known) = self.gpu.cudnn.get() {
            return known.as_ref().map_err(Clone::clone);
        }
        let opened = match self.compute_capability() {
            (9, 0) => Dnn::new(self.gpu.stream.cast()),
            (major, minor) => Err(Error::Unsupported {
                what: format!(
                    "attention by cuDNN on compute capability {major}.{minor}; it is used on 9.0 (Hopper)"
                ),
            }),
        };
        if let Err(error @ Error::Driver { .. }) = opened {
            return Err(error);
        }
        self.gpu.cudnn.get_or_init(|| opened).as_ref().map_err(Clone::clone)
    }

    /// The faults of launches, to give the next one its code.
    pub(super) fn faults(&self) -> Result<MutexGuard<'_, Faults>> {
        if lock(&self.gpu.faults).is_full() {
            self.synchronize()?;
        }
        Ok(lock(&self.gpu.faults))
    }

    /// Waits for the stream, and returns the fault that a kernel found, if any. Launches that may find one wait for the lock meanwhile, so
    /// that none comes between the copy of the fault word and the look at it.
    fn wait(&self) -> Result<()> {
        self.gpu.waits.fetch_add(1, Ordering::Relaxed);
        let mut faults = lock(&self.gpu.faults);
        faults.fetch(self.gpu.stream)?;
        // SAFETY: the stream is there as long as the handle.
        unsafe { cu!(cuStreamSynchronize(self.gpu.stream))? };
        if let Some(why) = self.gpu.interrupted.get() {
            return Err(Error::Interrupted { why: why.clone() });
        }
        faults.take(self.gpu.stream)
    }

    fn take(&self, bytes: usize) -> Result<CudaBuf> {
        let address = if bytes == 0 { 0 } else { lock(&self.gpu.memory).take(bytes)? };
        Ok(CudaBuf { address, bytes, gpu: self.gpu.clone() })
    }

    fn fill(&self, buf: &CudaBuf, bytes: Range<usize>, value: u8) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the range lies in the buffer.
        unsafe { cu!(cuMemsetD8Async(buf.address + bytes.start as u64, value, bytes.len(), self.gpu.stream)) }
    }

    /// An error unless the buffer lies on this device.
    pub(super) fn require(&self, buf: &CudaBuf) -> Result<()> {
        check::argument("memory", self.owns(buf), || {
            format!("a buffer lies on CUDA device {}, not on {}", buf.ordinal(), self.ordinal())
        })
    }
}

impl Gpu {
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as this lives.
        unsafe { cu!(cuCtxSetCurrent(self.context)) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Where a call fails, work before it has, and there is nobody left to tell.
        let _ = self.bind();
        // SAFETY: no buffer is left, since each holds this; the stream is idle before anything is freed, and every
        // handle is destroyed once.
        unsafe {
            let _ = cu!(cuStreamSynchronize(self.stream));
            drop(self.cublaslt.take());
            drop(self.cudnn.take());
            self.kernels.destroy();
            self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).destroy();
            self.memory.get_mut().unwrap_or_else(PoisonError::into_inner).destroy();
            let _ = cu!(cuStreamSynchronize(self.stream));
            let _ = cu!(cuStreamDestroy_v2(self.stream));
            let _ = cu!(cuDevicePrimaryCtxRelease_v2(self.device));
        }
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda")
            .field("ordinal", &self.ordinal())
            .field("name", &self.name())
            .field("memory", &self.memory())
            .finish()
    }
}

/// Bytes of a GPU's memory; dropped, they return to its allocator, in the order of the stream.
pub struct CudaBuf {
    address: CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl CudaBuf {
    /// Where its first byte lies in the GPU's memory; 0 where it has none.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub(super) fn ordinal(&self) -> usize {
        self.gpu.ordinal
    }
}

impl fmt::Debug for CudaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBuf").field("bytes", &self.bytes).field("ordinal", &self.ordinal()).finish()
    }
}

impl Drop for CudaBuf {
    fn drop(&mut self) {
        if self.bytes > 0 && self.gpu.bind().is_ok() {
            lock(&self.gpu.memory).give_back(self.address, self.bytes);
        }
    }
}

impl Device for Cuda {
    type Buf = CudaBuf;

    fn alloc(&self, bytes: usize) -> Result<CudaBuf> {
        self.bind()?;
        let buf = self.take(bytes)?;
        if self.gpu.poison {
            self.fill(&buf, 0..bytes, 0xff)?;
        }
        Ok(buf)
    }

    fn alloc_zeroed(&self, bytes: usize) -> Result<CudaBuf> {
        self.bind()?;
        let buf = self.take(bytes)?;
        self.fill(&buf, 0..bytes, 0)?;
        Ok(buf)
    }

    fn byte_len(buf: &CudaBuf) -> usize {
        buf.bytes
    }

    fn zero(&self, buf: &mut CudaBuf, bytes: Range<usize>) -> Result<()> {
        self.require(buf)?;
        let range = check::bytes(bytes, buf.bytes)?;
        self.bind()?;
        self.fill(buf, range, 0)
    }

    fn upload(&self, dst: &mut CudaBuf, at: usize, src: &[u8]) -> Result<()> {
        self.require(dst)?;
        let range = check::bytes(at..at.saturating_add(src.len()), dst.bytes)?;
        if range.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let (to, stream) = (dst.address + range.start as u64, self.gpu.stream);
        // SAFETY: the range lies in the buffer.
        unsafe { lock(&self.gpu.staging).upload(to, src, stream, &self.gpu.waits) }
    }

    fn download(&self, src: &CudaBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        self.require(src)?;
        let range = check::bytes(at..at.saturating_add(dst.len()), src.bytes)?;
        self.bind()?;
        let (from, stream) = (src.address + range.start as u64, self.gpu.stream);
        if range.is_empty() {
            return self.wait();
        }
        if dst.len() <= CHUNK {
            let mut staging = lock(&self.gpu.staging);
            // SAFETY: the range lies in the buffer.
            unsafe { staging.download(from, dst.len(), stream)? };
            self.wait()?;
            staging.downloaded(dst);
            return Ok(());
        }
        // SAFETY: the range lies in the buffer, and `dst` is not given back before the stream has come here.
        let copied = unsafe { cu!(cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), from, dst.len(), stream)) };
        copied.and(self.wait())
    }

    fn copy(&self, dst: &mut CudaBuf, at: usize, src: &CudaBuf, from: Range<usize>) -> Result<()> {
        self.require(dst)?;
        self.require(src)?;
        let from = check::bytes(from, src.bytes)?;
        let to = check::bytes(at..at.saturating_add(from.len()), dst.bytes)?;
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let (to, at) = (dst.address + to.start as u64, src.address + from.start as u64);
        // SAFETY: both ranges lie in their buffers, which are two.
        unsafe { cu!(cuMemcpyDtoDAsync_v2(to, at, from.len(), self.gpu.stream)) }
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.wait()
    }

    fn memory(&self) -> MemoryStats {
        lock(&self.gpu.memory).stats
    }

    fn reset_peak(&self) {
        let mut memory = lock(&self.gpu.memory);
        memory.stats.peak = memory.stats.live;
    }
}
