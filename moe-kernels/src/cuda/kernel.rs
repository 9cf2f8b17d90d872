//! Loaded kernels.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult};

use super::compile;
use super::driver::cu;
use super::source::Variant;
use crate::Result;

/// A kernel on one device.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) function: CUfunction,
    /// Sizes of its parameters in bytes.
    pub(super) parameters: Vec<usize>,
    /// Dynamic shared memory that it may use by now. Locked while the driver is told, so that no thread takes away what another has
    /// just been allowed.
    shared: Mutex<usize>,
}

// SAFETY: a handle of the driver may be used on any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Shared memory that every kernel may use without asking, what it declares itself included.
const DEFAULT_SHARED: usize = 48 << 10;

impl Kernel {
    fn new(function: CUfunction) -> Result<Self> {
        let mut parameters = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the pointers are valid for writing.
            match unsafe { sys::cuFuncGetParamInfo(function, parameters.len(), &mut offset, &mut size) } {
                CUresult::CUDA_SUCCESS => parameters.push(size),
                // Past the last one. (compute-sanitizer reports it, unless it is told `--report-api-errors no`.)
                CUresult::CUDA_ERROR_INVALID_VALUE => break,
                other => super::driver::check("cuFuncGetParamInfo", other)?,
            }
        }
        let (mut declared, attribute) = (0, CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        // SAFETY: as above.
        unsafe { cu!(cuFuncGetAttribute(&mut declared, attribute, function))? };
        let shared = DEFAULT_SHARED.saturating_sub(declared as usize);
        Ok(Kernel { function, parameters, shared: Mutex::new(shared) })
    }

    /// Lets it use `bytes` of dynamic shared memory.
    pub(super) fn allow_shared(&self, bytes: usize) -> Result<()> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes <= *shared {
            return Ok(());
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives as long as its device.
        unsafe { cu!(cuFuncSetAttribute(self.function, attribute, bytes as i32))? };
        *shared = bytes;
        Ok(())
    }
}

/// The kernels that a device has loaded so far.
#[derive(Debug, Default)]
pub(super) struct Kernels {
    modules: Mutex<HashMap<Variant, Module>>,
    kernels: RwLock<HashMap<(Variant, &'static str), Arc<Kernel>>>,
}

#[derive(Debug, Clone, Copy)]
struct Module(CUmodule);

// SAFETY: a handle of the driver may be used on any thread.
unsafe impl Send for Module {}

impl Kernels {
    /// The kernel `name` of a variant, compiled and loaded if this is its first use; the context is current.
    pub(super) fn get(
        &self,
        variant: &Variant,
        name: &'static str,
        capability: (i32, i32),
    ) -> Result<Arc<Kernel>> {
        let key = (*variant, name);
        // The maps are whole after every statement: a panic elsewhere harms nothing.
        if let Some(kernel) = self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(kernel.clone());
        }
        // Held while compiling, so that no two threads compile the same.
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(variant) {
            Some(&module) => module,
            None => {
                let module = load(&compile::cubin(variant, &compile::architecture(capability))?)?;
                modules.insert(*variant, module);
                module
            }
        };
        let mut function = std::ptr::null_mut();
        let c_name = CString::new(name).expect("names hold no zero bytes");
        // SAFETY: the module is loaded; the name ends with a zero.
        unsafe { cu!(cuModuleGetFunction(&mut function, module.0, c_name.as_ptr()))? };
        let kernel = Arc::new(Kernel::new(function)?);
        self.kernels.write().unwrap_or_else(PoisonError::into_inner).insert(key, kernel.clone());
        Ok(kernel)
    }

    /// Unloads everything.
    ///
    /// # Safety
    ///
    /// No kernel runs, and nothing is called afterwards.
    pub(super) unsafe fn destroy(&mut self) {
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, module) in modules.drain() {
            // SAFETY: it is loaded, and unloaded once.
            let _ = unsafe { cu!(cuModuleUnload(module.0)) };
        }
    }
}

fn load(cubin: &[u8]) -> Result<Module> {
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is a whole cubin, as the compiler made it.
    unsafe { cu!(cuModuleLoadData(&mut module, cubin.as_ptr().cast()))? };
    Ok(Module(module))
}
