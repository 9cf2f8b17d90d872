//! Launches: a kernel, its operands, its grid.

use std::sync::Arc;

use cudarc::driver::sys::{CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig};

use super::device::{Cuda, CudaBuf};
use super::driver::cu;
use super::fault::{Fault, FaultArgument};
use super::kernel::Kernel;
use super::source::Variant;
use super::tensor_map::TensorMap;
use crate::{Element, Error, Float, Result, View, ViewMut};

/// Words of all arguments of one launch: six tensor maps of 128 bytes, and 48 words besides.
const WORDS: usize = 6 * 16 + 48;
/// Most arguments of one launch.
const ARGUMENTS: usize = 48;

/// Arguments side by side, aligned as the largest needs.
#[repr(align(64))]
struct Words([u64; WORDS]);

/// A launch that is being put together. Arguments are in the order of the kernel's parameters.
pub(super) struct Launch<'a> {
    device: &'a Cuda,
    kernel: Arc<Kernel>,
    name: &'static str,
    words: Words,
    used: usize,
    /// Where each argument begins (in words), and its size in bytes.
    arguments: [(u16, u16); ARGUMENTS],
    count: usize,
    /// Which arguments are faults; their codes are given at the launch.
    faults: Vec<(usize, Fault)>,
    error: Option<Error>,
    grid: [usize; 3],
    block: [usize; 3],
    shared: usize,
    early: bool,
}

/// Most blocks that [`blocks`] gives: several times what any GPU runs at once.
const MOST_BLOCKS: usize = 1 << 20;

/// A grid in `x` for `pieces` of work, `each` per block; for more than fill it, kernels go round again (they step by the
/// grid's size).
pub(super) fn blocks(pieces: usize, each: usize) -> [usize; 3] {
    [pieces.div_ceil(each).min(MOST_BLOCKS), 1, 1]
}

impl Cuda {
    /// Begins a launch of the kernel `name` of a file, compiling the file if this is its first use.
    pub(super) fn kernel(&self, variant: &Variant, name: &'static str) -> Result<Launch<'_>> {
        Ok(Launch {
            device: self,
            kernel: self.load(variant, name)?,
            name,
            words: Words([0; WORDS]),
            used: 0,
            arguments: [(0, 0); ARGUMENTS],
            count: 0,
            faults: Vec::new(),
            error: None,
            grid: [1; 3],
            block: [1; 3],
            shared: 0,
            early: false,
        })
    }
}

impl Launch<'_> {
    /// A plain value: the kernel's parameter has the same size.
    pub(super) fn value<V: bytemuck::Pod>(mut self, value: V) -> Self {
        let words = size_of::<V>().div_ceil(8);
        // The largest (tensor maps) begin at multiples of 64 bytes.
        let at = if size_of::<V>() >= 64 { self.used.next_multiple_of(8) } else { self.used };
        assert!(self.count < ARGUMENTS && at + words <= WORDS, "{}: too many arguments", self.name);
        bytemuck::cast_slice_mut(&mut self.words.0[at..at + words])[..size_of::<V>()]
            .copy_from_slice(bytemuck::bytes_of(&value));
        self.arguments[self.count] = (at as u16, size_of::<V>() as u16);
        self.count += 1;
        self.used = at + words;
        self
    }

    /// A size or an index: `i64`.
    pub(super) fn size(self, size: usize) -> Self {
        self.value(size as i64)
    }

    /// A factor in the accumulation type: `Acc`.
    pub(super) fn acc<T: Float>(self, x: f64) -> Self {
        self.value(T::Acc::from_f64(x))
    }

    /// A matrix to read: `const E *`, `i64` row stride in elements.
    pub(super) fn mat<E: Element>(mut self, view: View<'_, E, Cuda>) -> Self {
        let layout = view.layout();
        self.check(view.buf());
        self.value(view.buf().address() + (layout.offset * size_of::<E>()) as u64).size(layout.stride)
    }

    /// A matrix to write: `E *`, `i64` row stride in elements.
    pub(super) fn mat_mut<E: Element>(mut self, view: &mut ViewMut<'_, E, Cuda>) -> Self {
        let layout = view.layout();
        self.check(view.buf());
        self.value(view.buf().address() + (layout.offset * size_of::<E>()) as u64).size(layout.stride)
    }

    /// A `[1, n]` matrix to read: `const E *`.
    pub(super) fn vector<E: Element>(mut self, view: View<'_, E, Cuda>) -> Self {
        self.check(view.buf());
        self.value(view.buf().address() + (view.layout().offset * size_of::<E>()) as u64)
    }

    /// A `[1, n]` matrix to write: `E *`.
    pub(super) fn vector_mut<E: Element>(mut self, view: &mut ViewMut<'_, E, Cuda>) -> Self {
        self.check(view.buf());
        let offset = view.layout().offset;
        self.value(view.buf().address() + (offset * size_of::<E>()) as u64)
    }

    /// A `[1, n]` matrix to read, or null.
    pub(super) fn vector_or_null<E: Element>(self, view: Option<View<'_, E, Cuda>>) -> Self {
        match view {
            Some(view) => self.vector(view),
            None => self.value(0u64),
        }
    }

    /// A `[1, n]` matrix to write, or null.
    pub(super) fn vector_mut_or_null<E: Element>(self, view: Option<&mut ViewMut<'_, E, Cuda>>) -> Self {
        match view {
            Some(view) => self.vector_mut(view),
            None => self.value(0u64),
        }
    }

    /// A matrix to read, or null and 0.
    pub(super) fn mat_or_null<E: Element>(self, view: Option<View<'_, E, Cuda>>) -> Self {
        match view {
            Some(view) => self.mat(view),
            None => self.value(0u64).size(0),
        }
    }

    /// A matrix to write, or null and 0.
    pub(super) fn mat_mut_or_null<E: Element>(self, view: Option<&mut ViewMut<'_, E, Cuda>>) -> Self {
        match view {
            Some(view) => self.mat_mut(view),
            None => self.value(0u64).size(0),
        }
    }

    /// Scratch memory: a pointer. It may be dropped after the launch, which comes first on the stream.
    pub(super) fn scratch(mut self, buf: &CudaBuf) -> Self {
        self.check(buf);
        self.value(buf.address())
    }

    /// A matrix that the copy engine moves tiles of, as it sees it: `TensorMap`.
    pub(super) fn map<E: Element>(self, view: View<'_, E, Cuda>, map: TensorMap) -> Self {
        self.uses(view.buf()).value(map)
    }

    /// Where the kernel reports a fault: `Fault`.
    pub(super) fn fault(mut self, fault: Fault) -> Self {
        self.faults.push((self.count, fault));
        self.value(<FaultArgument as bytemuck::Zeroable>::zeroed())
    }

    /// Blocks; nothing is launched if one number is 0. At most 2³¹ − 1, 65535 and 65535.
    pub(super) fn grid(mut self, grid: [usize; 3]) -> Self {
        self.grid = grid;
        self
    }

    /// Threads of a block.
    pub(super) fn block(mut self, block: [usize; 3]) -> Self {
        self.block = block;
        self
    }

    /// Dynamic shared memory in bytes; more than 48 KiB is allowed to the kernel as needed.
    pub(super) fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }

    /// Lets it begin before the launch before it has ended, which costs some microseconds otherwise: the kernel waits for that by
    /// `await_previous` before it touches what others read or write.
    pub(super) fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// Says that the kernel uses a buffer whose address is among its values.
    pub(super) fn uses(mut self, buf: &CudaBuf) -> Self {
        self.check(buf);
        self
    }

    /// An operand must lie on this device.
    fn check(&mut self, buf: &CudaBuf) {
        if !self.device.owns(buf) {
            let what =
                format!("an operand lies on CUDA device {}, not on {}", buf.ordinal(), self.device.ordinal());
            self.error = Some(Error::Argument { kernel: self.name, what });
        }
    }

    /// Puts the kernel on the stream.
    ///
    /// # Safety
    ///
    /// The arguments are those the kernel takes, and with them it stays inside its operands and writes only those that were
    /// given as [`Launch::mat_mut`] or [`Launch::scratch`].
    pub(super) unsafe fn launch(mut self) -> Result<()> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.grid.contains(&0) {
            return Ok(());
        }
        let sizes = self.arguments[..self.count].iter().map(|&(_, size)| size as usize);
        if !sizes.clone().eq(self.kernel.parameters.iter().copied()) {
            let (given, takes) = (sizes.collect::<Vec<_>>(), &self.kernel.parameters);
            let what = format!("arguments of {given:?} bytes for parameters of {takes:?}");
            return Err(Error::Argument { kernel: self.name, what });
        }
        self.kernel.allow_shared(self.shared)?;
        let [gx, gy, gz] = self.grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let [bx, by, bz] = self.block.map(|n| n as u32);
        self.device.bind()?;
        // Held until the launch is on the stream: its codes are not looked at before.
        let mut faults = if self.faults.is_empty() { None } else { Some(self.device.faults()?) };
        if let Some(faults) = &mut faults {
            for (i, fault) in std::mem::take(&mut self.faults) {
                let at = self.arguments[i].0 as usize;
                let argument = faults.argument(self.name, fault);
                self.words.0[at..at + 2].copy_from_slice(&argument.words());
            }
        }
        let base = self.words.0.as_mut_ptr();
        let mut pointers = [std::ptr::null_mut(); ARGUMENTS];
        for (pointer, &(at, _)) in pointers.iter_mut().zip(&self.arguments[..self.count]) {
            // SAFETY: arguments begin inside the words.
            *pointer = unsafe { base.add(at as usize) }.cast();
        }
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: self.shared as u32,
            hStream: self.device.stream(),
            attrs: &mut early,
            // GPUs before Hopper do not know it.
            numAttrs: u32::from(self.early && self.device.compute_capability() >= (9, 0)),
        };
        let (function, nothing) = (self.kernel.function, std::ptr::null_mut());
        // SAFETY: there is one pointer for each parameter, to as many bytes as it has; the rest is the caller's promise.
        unsafe { cu!(cuLaunchKernelEx(&config, function, pointers.as_mut_ptr(), nothing)) }
    }
}
