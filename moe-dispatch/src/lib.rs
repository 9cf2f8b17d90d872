//! moe-dispatch
