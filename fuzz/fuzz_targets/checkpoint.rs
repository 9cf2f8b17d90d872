//! The input is what the manifest of a checkpoint says, under the right hash, of a file with 64 bytes; `"#16"` in it is the hash
//! of 16 of these.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_fuzz::{FOLDER, put};
use moe_train::checkpoint::container::Checkpoint;

const BYTES: [u8; 64] = [1; 64];

fuzz_target!(|data: &[u8]| {
    let mut text = String::from_utf8_lossy(data).into_owned();
    for n in 1..=BYTES.len() {
        if text.contains("\"#") {
            text = text.replace(&format!("\"#{n}\""), &format!("\"{}\"", blake3::hash(&BYTES[..n]).to_hex()));
        }
    }
    put("rank-00000.bin", &BYTES);
    let hash = blake3::hash(text.as_bytes()).to_hex();
    let manifest =
        [b"{\"blake3\":\"", hash.as_bytes(), b"\",\"manifest\":", text.as_bytes(), b"}\n"].concat();
    put("manifest.json", &manifest);
    let Ok(checkpoint) = Checkpoint::open(&FOLDER) else { return };
    for tensor in checkpoint.tensors() {
        let [rows, cols] = tensor.dims;
        // Unless a checksum is wrong, the whole tensor is there.
        if let Ok(bytes) = checkpoint.read_tensor(tensor.name, tensor.kind) {
            assert_eq!(bytes.len(), rows * cols * tensor.dtype.size());
        }
    }
});
