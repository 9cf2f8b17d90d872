//! The input is the index of a folder of weights with two files, which have all tensors between them.
#![no_main]

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use moe_fuzz::{FOLDER, put, read_weights};

const SHARDS: [(&str, &[u8]); 2] = [
    ("a.safetensors", include_bytes!("../seeds/a.safetensors")),
    ("b.safetensors", include_bytes!("../seeds/b.safetensors")),
];

static WRITTEN: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    WRITTEN.call_once(|| SHARDS.iter().for_each(|(name, data)| drop(put(name, data))));
    put("model.safetensors.index.json", data);
    read_weights(&FOLDER);
});
