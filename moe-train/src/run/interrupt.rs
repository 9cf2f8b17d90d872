//! Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that Ctrl-C raises, and says so if `say`; the second Ctrl-C ends the process at once.
pub(super) fn flag(say: bool) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    let installed = ctrlc::set_handler(move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        if say {
            eprintln!("\ninterrupted: saving after this step (again to leave at once)");
        }
    });
    if let Err(error) = installed {
        eprintln!("warning: Ctrl-C will not save: {error}");
    }
    flag
}
