//! The input is the one file of a folder of weights.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_fuzz::{FOLDER, put, read_weights};

fuzz_target!(|data: &[u8]| {
    put("model.safetensors", data);
    read_weights(&FOLDER);
});
