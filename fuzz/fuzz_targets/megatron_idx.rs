//! The input is the length of a `.bin` in eight bytes, and an `.idx`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_train::data::megatron::MegatronIndex;

fuzz_target!(|data: &[u8]| {
    let Some((bin_bytes, idx)) = data.split_first_chunk() else { return };
    let Ok(index) = MegatronIndex::new(idx, u64::from_le_bytes(*bin_bytes)) else { return };
    let mut end = 0;
    for i in 0..index.documents() {
        let document = index.document(i).expect("a document of a checked index");
        assert_eq!(document.start, end);
        end = document.end;
    }
    assert_eq!(end, index.tokens());
    assert_eq!(index.document(index.documents()), None);
});
