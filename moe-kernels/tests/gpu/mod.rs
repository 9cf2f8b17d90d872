//! The GPU that tests run on, if there is one.

use moe_kernels::{Cuda, cuda};

/// The first GPU with poisoned memory; `None`, said aloud, where there is none.
pub fn gpu(test: &str) -> Option<Cuda> {
    match cuda::probe() {
        Ok(count) if count > 0 => Some(Cuda::poisoned(0).expect("a GPU that can be used")),
        absent => {
            let why = absent.map_or_else(|error| error.to_string(), |_| "no CUDA device".into());
            assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "{test}: {why}");
            eprintln!("{test} was skipped: {why}");
            None
        }
    }
}
