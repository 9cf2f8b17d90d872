//! Calls of the driver, with errors that say which call and why.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUresult};

use crate::{Error, Result};

/// An error unless `result` is success.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(error(call, result)) }
}

fn error(call: &'static str, result: CUresult) -> Error {
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null where it does not know the code.
    let reason = unsafe {
        sys::cuGetErrorString(result, &mut text);
        if text.is_null() {
            "unknown error".into()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    };
    Error::Driver { call, code: result as i32, reason }
}

/// Calls a function of the driver and returns its error, if any. To be used inside `unsafe`.
macro_rules! cu {
    ($call:ident($($argument:expr),* $(,)?)) => {
        $crate::cuda::driver::check(stringify!($call), ::cudarc::driver::sys::$call($($argument),*))
    };
}
pub(super) use cu;
