//! What training data takes of memory, however large its files are.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File};
use std::sync::atomic::{AtomicUsize, Ordering};

use moe_train::data::{Blend, Dataset, Place, Tokens};

/// Counts the bytes in use, and the most there were.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: forwards every call to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(used, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Two datasets of 2^33 tokens, of which the files are holes: opened, blended and read at random in less memory than a thousandth
/// of a permutation of their samples would take.
#[test]
fn billions_of_tokens_are_blended_in_kilobytes() {
    const DOCUMENTS: u64 = 1 << 14;
    const LENGTH: u64 = 1 << 19;
    const SEQUENCE: usize = 64;
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("sparse");
    File::create(folder.path().join("sparse.bin")).unwrap().set_len(2 * DOCUMENTS * LENGTH).unwrap();
    let mut idx = b"MMIDIDX\0\0\x01\0\0\0\0\0\0\0\x08".to_vec();
    idx.extend([DOCUMENTS, DOCUMENTS + 1].map(u64::to_le_bytes).concat());
    idx.extend((0..DOCUMENTS).flat_map(|_| (LENGTH as i32).to_le_bytes()));
    idx.extend((0..DOCUMENTS).flat_map(|i| (2 * i * LENGTH).to_le_bytes()));
    idx.extend((0..=DOCUMENTS).flat_map(u64::to_le_bytes));
    fs::write(folder.path().join("sparse.idx"), idx).unwrap();

    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let open = || Dataset::new(Tokens::open(&prefix).unwrap(), 256, SEQUENCE).unwrap();
    let sets = [open(), open()];
    let samples = [&sets[0], &sets[1]].map(Dataset::len);
    assert_eq!(samples, [((1 << 33) - 1) / 64; 2]);
    let blend = Blend::new(1, &[1.0, 2.0], &samples).unwrap();
    for g in (0..50).chain(1_000_000_000..1_000_000_050) {
        let Place { dataset, sample } = blend.at(g);
        assert_eq!(sets[dataset].sample(sample).unwrap(), [0; SEQUENCE + 1]);
        assert!(sets[dataset].document_starts(sample).unwrap().len() <= 1);
    }
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert!(peak < 64 << 10, "{peak} bytes");
}
