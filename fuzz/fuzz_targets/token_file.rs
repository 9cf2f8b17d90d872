//! The input is a token file whose header has the right checksum, which a fuzzer would not guess.
#![no_main]

use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use moe_fuzz::put;
use moe_train::data::TokenFile;

const HASHED: Range<usize> = 0..72;
const HASH: Range<usize> = 72..104;

fuzz_target!(|data: &[u8]| {
    let mut data = data.to_vec();
    if data.len() >= HASH.end {
        let hash = blake3::hash(&data[HASHED]);
        data[HASH].copy_from_slice(hash.as_bytes());
    }
    let Ok(file) = TokenFile::open(&put("tokens", &data)) else { return };
    assert_eq!(file.tokens(0..file.len()).expect("all tokens").len() as u64, file.len());
    assert!(file.tokens(0..file.len() + 1).is_err());
    // Offsets and mask are inside of the file, or an error says so.
    for i in 0..file.documents() {
        if let Ok(document) = file.document(i) {
            file.tokens(document).expect("a document's tokens");
        }
    }
    let _ = file.mask(0..file.len());
    let _ = file.verify();
});
