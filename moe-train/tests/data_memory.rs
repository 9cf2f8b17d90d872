//! What data takes of memory, however large its files are: in training, and as it is prepared.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use moe_train::data::{Blend, Corpus, Dataset, Encoder, Place, TokenizerKind, Tokens};

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

/// All memory is counted, so one test runs at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most bytes that were in use during a call, beyond those before.
fn peak_of(call: impl FnOnce()) -> usize {
    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    call();
    PEAK.load(Ordering::Relaxed) - before
}

/// Two datasets of 2^33 tokens, of which the files are holes: opened, blended and read at random in less memory than a thousandth
/// of a permutation of their samples would take.
#[test]
fn billions_of_tokens_are_blended_in_kilobytes() {
    const DOCUMENTS: u64 = 1 << 14;
    const LENGTH: u64 = 1 << 19;
    const SEQUENCE: usize = 64;
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("sparse");
    File::create(folder.path().join("sparse.bin")).unwrap().set_len(2 * DOCUMENTS * LENGTH).unwrap();
    let mut idx = b"MMIDIDX\0\0\x01\0\0\0\0\0\0\0\x08".to_vec();
    idx.extend([DOCUMENTS, DOCUMENTS + 1].map(u64::to_le_bytes).concat());
    idx.extend((0..DOCUMENTS).flat_map(|_| (LENGTH as i32).to_le_bytes()));
    idx.extend((0..DOCUMENTS).flat_map(|i| (2 * i * LENGTH).to_le_bytes()));
    idx.extend((0..=DOCUMENTS).flat_map(u64::to_le_bytes));
    fs::write(folder.path().join("sparse.idx"), idx).unwrap();

    let peak = peak_of(|| {
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
    });
    assert!(peak < 64 << 10, "{peak} bytes");
}

/// Documents of 2000 bytes, as two threads make tokens of them, each byte one.
fn prepared_in(input: PathBuf, documents: u64) -> usize {
    let out = input.with_extension("tokens");
    let encoder = Encoder::open(&TokenizerKind::Byte, None).unwrap();
    let corpus = Corpus { threads: 2, part_bytes: Some(1 << 20), ..Corpus::new(vec![input], encoder, out) };
    peak_of(|| {
        let prepared = corpus.prepare(&mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((prepared.documents, prepared.tokens), (documents, 2000 * documents));
    })
}

/// 8 times as long a corpus takes little more memory: where its documents start, 8 bytes each while the vector grows.
fn grows_by_its_index(input: impl Fn(&Path, u64) -> PathBuf) {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let [short, long] =
        [4_000, 32_000].map(|documents| prepared_in(input(folder.path(), documents), documents));
    assert!(short < 4 << 20, "{short} bytes for 8 MB");
    assert!(long < short + 3 * 8 * 32_000, "{long} bytes for 64 MB, {short} for 8 MB");
}

#[test]
fn json_lines_are_prepared_in_the_memory_of_a_document() {
    grows_by_its_index(|folder, documents| {
        let path = folder.join(format!("{documents}.jsonl"));
        let mut file = BufWriter::new(File::create(&path).unwrap());
        for i in 0..documents {
            writeln!(file, "{{\"text\": \"{i:02000}\"}}").unwrap();
        }
        file.flush().unwrap();
        path
    });
}

/// One row group, whose column is in pages of a megabyte.
#[cfg(feature = "parquet")]
#[test]
fn parquet_is_prepared_in_the_memory_of_its_pages() {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    grows_by_its_index(|folder, documents| {
        let path = folder.join(format!("{documents}.parquet"));
        let schema = parse_message_type("message corpus { required binary text (STRING); }").unwrap();
        let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
        let file = File::create(&path).unwrap();
        let mut file = SerializedFileWriter::new(file, schema.into(), properties.into()).unwrap();
        let mut group = file.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        for i in 0..documents {
            let text = ByteArray::from(format!("{i:02000}").into_bytes());
            column.typed::<ByteArrayType>().write_batch(&[text], None, None).unwrap();
        }
        column.close().unwrap();
        group.close().unwrap();
        file.close().unwrap();
        path
    });
}
