//! NCCL, loaded when it is first asked for, and its calls with errors that say why.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::Library;

use crate::{Error, Result};

/// What a call returns: a code, as versions to come may have more of them than the bindings' enum.
pub(super) type Code = c_int;
pub(super) type Stream = *mut c_void;

/// The codes that are told apart.
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;

/// Names under which it is looked for: the package of the Python index has the first only, and distributions' headers the second.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used.
        pub(super) struct Nccl {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: Library,
        }

        impl Nccl {
            fn of(library: Library) -> std::result::Result<Self, libloading::Error> {
                // SAFETY: types are those of nccl.h, which have not changed since version 2.13.
                Ok(unsafe { Nccl { $($field: *library.get($name)?,)* _library: library } })
            }
        }
    };
}
functions! {
    unique_id = b"ncclGetUniqueId\0": fn(*mut ncclUniqueId) -> Code;
    init_rank = b"ncclCommInitRank\0": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> Code;
    destroy = b"ncclCommDestroy\0": fn(ncclComm_t) -> Code;
    abort = b"ncclCommAbort\0": fn(ncclComm_t) -> Code;
    async_error = b"ncclCommGetAsyncError\0": fn(ncclComm_t, *mut Code) -> Code;
    error_string = b"ncclGetErrorString\0": fn(Code) -> *const c_char;
    last_error = b"ncclGetLastError\0": fn(ncclComm_t) -> *const c_char;
    group_start = b"ncclGroupStart\0": fn() -> Code;
    group_end = b"ncclGroupEnd\0": fn() -> Code;
    all_reduce = b"ncclAllReduce\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> Code;
    reduce = b"ncclReduce\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, Stream) -> Code;
    reduce_scatter = b"ncclReduceScatter\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> Code;
    all_gather = b"ncclAllGather\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, Stream) -> Code;
    broadcast = b"ncclBroadcast\0": fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> Code;
    send = b"ncclSend\0": fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> Code;
    recv = b"ncclRecv\0": fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> Code;
}

impl Nccl {
    /// The library, from the first use on.
    pub(super) fn get() -> Result<&'static Nccl> {
        static NCCL: OnceLock<std::result::Result<Nccl, String>> = OnceLock::new();
        let load = || {
            let mut reasons = Vec::new();
            for name in NAMES {
                // SAFETY: loading NCCL runs its initialisers, which have no requirements.
                match unsafe { Library::new(name) }.and_then(Nccl::of) {
                    Ok(nccl) => return Ok(nccl),
                    // What the loader says, with the name and why.
                    Err(why) => {
                        reasons.push(why.source().map_or_else(|| why.to_string(), ToString::to_string))
                    }
                }
            }
            Err(reasons.join("; "))
        };
        NCCL.get_or_init(load).as_ref().map_err(|reasons| {
            Error::Device(moe_kernels::Error::Library {
                library: "NCCL (libnccl)",
                looked_for: reasons.clone(),
                fix: "it comes by `pip install nvidia-nccl-cu13` (of CUDA 12: `nvidia-nccl-cu12`), or as libnccl2 of NVIDIA's repositories; \
                      add its folder to LD_LIBRARY_PATH",
            })
        })
    }

    /// An error with what NCCL says of `code`, unless it is success.
    pub(super) fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: both are strings that end with a zero, the first static, the second kept until the next error of this thread.
        let (kind, last) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        let reason = if last.is_empty() { kind } else { format!("{kind}: {last}") };
        Err(Error::Device(moe_kernels::Error::Driver { call, code, reason }))
    }

    /// What has gone wrong with operations of `comm` since they were started.
    ///
    /// # Safety
    ///
    /// The communicator is alive.
    pub(super) unsafe fn check_async(&self, comm: ncclComm_t) -> Result<()> {
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive, the pointer valid for writing.
        self.check("ncclCommGetAsyncError", unsafe { (self.async_error)(comm, &mut code) })?;
        if code == IN_PROGRESS { Ok(()) } else { self.check("an operation of NCCL", code) }
    }
}

/// # Safety
///
/// Null, or the start of a string that ends with a zero.
unsafe fn text(at: *const c_char) -> String {
    if at.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is_missing_the_error_says_how_to_get_it() {
        match Nccl::get() {
            // A code that no version has.
            Ok(nccl) => assert!(nccl.check("a call", 1000).is_err()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("libnccl.so.2") && text.contains("pip install"), "{text}");
            }
        }
    }
}
