use std::fs;

use proptest::prelude::*;

use super::*;

/// What `tests/fixtures/make_megatron.py` gave Megatron to write.
const UINT16: [&[u32]; 4] = [&[1, 2, 65498], &[], &[4, 5], &[50256]];
const INT32: [&[u32]; 4] = [&[70000, 0], &[3, 4, 5], &[], &[]];
const SENTENCES: [&[u32]; 2] = [&[10, 11, 12], &[20, 21, 22, 23, 24]];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/megatron").join(name)
}

fn documents(file: &MegatronFile) -> Vec<Vec<u32>> {
    (0..file.documents()).map(|i| file.tokens(file.document(i).unwrap()).unwrap()).collect()
}

fn write(prefix: &Path, vocab_size: u32, documents: &[&[u32]]) {
    let mut writer = MegatronWriter::create(prefix, vocab_size).unwrap();
    for document in documents {
        writer.document(document).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_megatron_wrote_is_read() {
    for (name, wanted, dtype, sequences) in [
        ("uint16", &UINT16[..], MegatronDType::U16, 3),
        ("int32", &INT32, MegatronDType::I32, 2),
        ("sentences", &SENTENCES, MegatronDType::U16, 5),
    ] {
        let file = MegatronFile::open(&fixture(name)).unwrap();
        assert_eq!(documents(&file), wanted, "{name}");
        assert_eq!(file.tokens(0..file.len()).unwrap(), wanted.concat());
        assert_eq!((file.dtype(), file.sequences()), (dtype, sequences));
        assert!(!file.verify().unwrap(), "Megatron writes no checksums");
    }
    let error = MegatronFile::open(&fixture("multimodal")).unwrap_err().to_string();
    assert!(
        error.contains("multimodal: ") && error.ends_with("multimodal datasets are not supported"),
        "{error}"
    );
}

#[test]
fn files_are_those_of_megatron_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    for (name, documents, vocab_size) in [("uint16", UINT16, 65499), ("int32", INT32, 65500 + 4501)] {
        // A prefix with a point is no extension.
        let prefix = folder.path().join(format!("{name}.text"));
        write(&prefix, vocab_size, &documents);
        for extension in [".bin", ".idx"] {
            let (ours, theirs) =
                [&prefix, &fixture(name)].map(|prefix| fs::read(beside(prefix, extension)).unwrap()).into();
            assert_eq!(ours, theirs, "{name}{extension}");
        }
        assert!(MegatronFile::open(&prefix).unwrap().verify().unwrap());
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 6);
}

#[test]
fn an_empty_dataset_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, 300, &[]);
    let file = MegatronFile::open(&prefix).unwrap();
    assert_eq!((file.len(), file.documents()), (0, 0));
    assert!(file.verify().unwrap());
    assert!(file.document(0).is_err());
}

#[test]
fn the_type_is_the_one_that_megatron_chooses() {
    assert_eq!(MegatronDType::optimal(65499), MegatronDType::U16);
    assert_eq!(MegatronDType::optimal(65500), MegatronDType::I32);
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    let last = (1_u32 << 31) - 1;
    write(&prefix, 1 << 31, &[&[last]]);
    assert_eq!(MegatronFile::open(&prefix).unwrap().tokens(0..1).unwrap(), [last]);
    let error = MegatronWriter::create(&prefix, (1 << 31) + 1).unwrap_err().to_string();
    assert_eq!(error, "a vocabulary of 2147483649 tokens, but the format takes at most 2147483648");
}

#[test]
fn an_unfinished_dataset_leaves_the_old_one_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, 300, &[&[1]]);
    let mut writer = MegatronWriter::create(&prefix, 300).unwrap();
    writer.append(&[2, 3]).unwrap();
    assert!(writer.append(&[300]).is_err());
    assert!(writer.finish().unwrap_err().to_string().ends_with("d.bin: the last document was not ended"));
    assert_eq!(documents(&MegatronFile::open(&prefix).unwrap()), [[1]]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    write(&prefix, 300, &[&[2], &[3]]);
    let file = MegatronFile::open(&prefix).unwrap();
    assert!(file.verify().unwrap());
    assert_eq!(file.documents(), 2);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
}

/// An `.idx` from its parts, in any of the types.
fn idx(code: u8, lengths: &[i32], pointers: &[i64], indices: &[i64]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.push(code);
    bytes.extend((lengths.len() as u64).to_le_bytes());
    bytes.extend((indices.len() as u64).to_le_bytes());
    bytes.extend(lengths.iter().flat_map(|n| n.to_le_bytes()));
    bytes.extend(pointers.iter().chain(indices).flat_map(|n| n.to_le_bytes()));
    bytes
}

#[test]
fn every_integer_type_is_read_and_no_negative_token() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    let read = |code: u8, width: i64, bin: &[u8]| {
        fs::write(beside(&prefix, ".bin"), bin).unwrap();
        fs::write(beside(&prefix, ".idx"), idx(code, &[2, 1], &[0, 2 * width], &[0, 2])).unwrap();
        let file = MegatronFile::open(&prefix)?;
        file.verify()?;
        file.tokens(1..3)
    };
    let bytes = |values: [i64; 3], width: usize| {
        values.iter().flat_map(|value| value.to_le_bytes().into_iter().take(width)).collect::<Vec<u8>>()
    };
    for (code, width, largest) in
        [(1, 1, 255), (2, 1, 127), (3, 2, 32767), (4, 4, 2_147_483_647), (5, 8, 4_294_967_295), (8, 2, 65535)]
    {
        let tokens = read(code, width, &bytes([3, largest, 7], width as usize)).unwrap();
        assert_eq!(tokens, [largest as u32, 7], "type {code}");
        let beyond = read(code, width, &bytes([3, 7, largest + 1], width as usize));
        match code {
            // What is too large for an unsigned type starts again at 0.
            1 | 8 => assert_eq!(beyond.unwrap(), [7, 0]),
            5 => assert!(
                beyond.unwrap_err().to_string().contains("token 2 is 4294967296, but it must be from 0 to")
            ),
            _ => {
                let error = beyond.unwrap_err().to_string();
                assert!(error.contains(&format!("token 2 is {}, but", -largest - 1)), "{error}");
            }
        }
    }
    for code in [0, 6, 7, 9] {
        let error = read(code, 4, &[0; 12]).unwrap_err().to_string();
        assert!(error.contains(&format!("type {code}, which is none of 1 to 5 and 8")), "{error}");
    }
}

#[test]
fn an_index_that_megatron_would_not_write_is_refused() {
    let refused = |idx: Vec<u8>, bin: u64, what: &str| {
        let error = MegatronIndex::new(idx, bin).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(b"MMIDIDX\0".to_vec(), 0, "no index");
    refused(b"MMIDIDX\0\0".to_vec(), 0, "9 bytes, but 34 were expected");
    let mut later = idx(8, &[], &[], &[0]);
    later[9] = 2;
    refused(later, 0, "version 2");
    refused(idx(8, &[2, -1], &[0, 4], &[0, 2]), 4, "sequence 1 has -1 tokens");
    refused(
        idx(8, &[2, 1], &[0, 2], &[0, 2]),
        6,
        "sequence 1 starts at byte 2, but those before it end at 4",
    );
    refused(idx(8, &[2, 1], &[0, -4], &[0, 2]), 6, "sequence 1 starts at byte -4");
    refused(idx(8, &[2, 1], &[4, 4], &[0, 2]), 6, "sequence 0 starts at byte 4");
    refused(idx(8, &[2, 1], &[0, 4], &[0, 2]), 5, "the .bin has 5 bytes, but 6 were expected");
    refused(idx(8, &[2, 1], &[0, 4], &[0, 2]), 8, "the .bin has 8 bytes, but 6 were expected");
    refused(
        idx(8, &[2, 1], &[0, 4], &[1, 2]),
        6,
        "document 0 starts at sequence 1, but it must be from 0 to 0",
    );
    refused(
        idx(8, &[2, 1], &[0, 4], &[0, 2, 1, 2]),
        6,
        "document 2 starts at sequence 1, but it must be from 2 to 2",
    );
    refused(
        idx(8, &[2, 1], &[0, 4], &[0, 1]),
        6,
        "document 1 starts at sequence 1, but it must be from 2 to 2",
    );
    refused(
        idx(8, &[2, 1], &[0, 4], &[0, 3]),
        6,
        "document 1 starts at sequence 3, but it must be from 2 to 2",
    );
    refused(idx(8, &[], &[], &[]), 0, "no document indices");
    refused(idx(8, &[2], &[0], &[0]), 4, "document 0 starts at sequence 0, but it must be from 1 to 0");
    // Counts that no file can have, and whose product overflows.
    for at in [18, 26] {
        for count in [u64::MAX, 1 << 62, (1 << 61) + 1] {
            let mut bytes = idx(8, &[2, 1], &[0, 4], &[0, 2]);
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            refused(bytes, 6, "was cut off or extended");
        }
    }
}

/// Whatever is cut off or flipped, the index is refused or says the same.
#[test]
fn every_truncation_and_every_flipped_bit_is_refused_or_harmless() {
    for name in ["uint16", "int32", "sentences"] {
        let good = fs::read(beside(&fixture(name), ".idx")).unwrap();
        let bin = fs::metadata(beside(&fixture(name), ".bin")).unwrap().len();
        let index = MegatronIndex::new(&good[..], bin).unwrap();
        let all = |index: &MegatronIndex<&[u8]>| {
            let documents: Vec<_> = (0..index.documents()).map(|i| index.document(i)).collect();
            (index.dtype().width(), index.tokens(), documents)
        };
        for length in 0..good.len() {
            assert!(MegatronIndex::new(&good[..length], bin).is_err(), "{name} of {length} bytes");
        }
        for bit in 0..8 * good.len() {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Ok(accepted) = MegatronIndex::new(&bad[..], bin) {
                let same = all(&accepted) == all(&index);
                // Which of two types of the same width, and where a document ends and the next one starts, no other byte of the
                // index says.
                let document_index = bit / 8 >= HEADER + 12 * index.sequences() as usize;
                assert!(same || document_index, "{name}, bit {bit}");
                assert_eq!(accepted.tokens(), index.tokens());
            }
        }
    }
}

#[test]
fn what_changed_since_it_was_written_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("d");
    write(&prefix, 300, &[&[1, 2, 299], &[4, 5]]);
    let check = || MegatronFile::open(&prefix).and_then(|file| file.verify());
    assert!(check().unwrap());
    for extension in [".bin", ".idx"] {
        let path = beside(&prefix, extension);
        let good = fs::read(&path).unwrap();
        for bit in 0..8 * good.len() {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::remove_file(&path).unwrap();
            fs::write(&path, bad).unwrap();
            let error = check().expect_err("a flipped bit was accepted").to_string();
            assert!(
                error.starts_with("Megatron dataset ") && error.contains(&prefix.display().to_string()),
                "{error}"
            );
        }
        fs::write(&path, &good).unwrap();
    }
    let sums = beside(&prefix, ".blake3.json");
    for damaged in [&b"{}"[..], b"", &[b' '; 5000]] {
        fs::write(&sums, damaged).unwrap();
        let error = check().unwrap_err().to_string();
        assert!(error.contains("the .blake3.json is damaged"), "{error}");
    }
    fs::remove_file(&sums).unwrap();
    assert!(!check().unwrap());
}

#[test]
fn what_is_not_there_is_refused() {
    let file = MegatronFile::open(&fixture("uint16")).unwrap();
    assert!(file.tokens(5..7).unwrap_err().to_string().ends_with("uint16: tokens 5..7 of 6"));
    assert!(file.tokens(u64::MAX - 1..u64::MAX).is_err());
    assert!(file.document(4).unwrap_err().to_string().ends_with("uint16: documents 4..5 of 4"));
    assert!(file.document(u64::MAX).is_err());
    let error = MegatronFile::open(&fixture("gone")).unwrap_err().to_string();
    assert!(error.contains("gone.bin"), "{error}");
    assert!(MegatronFile::exists(&fixture("uint16")) && !MegatronFile::exists(&fixture("gone")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn documents_round_trip(
        documents in prop::collection::vec(prop::collection::vec(0_u32..70_000, 0..9), 0..20),
        wide: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("d");
        let vocab_size = if wide { 70_000 } else { 65_499 };
        let written: Vec<Vec<u32>> =
            documents.iter().map(|d| d.iter().map(|token| token % vocab_size).collect()).collect();
        write(&prefix, vocab_size, &written.iter().map(|d| &d[..]).collect::<Vec<_>>());
        let file = MegatronFile::open(&prefix).unwrap();
        let read: Vec<Vec<u32>> =
            (0..file.documents()).map(|i| file.tokens(file.document(i).unwrap()).unwrap()).collect();
        prop_assert_eq!(read, written);
    }

    /// No bytes make it panic, also after a header that is right.
    #[test]
    fn any_bytes_are_an_index_or_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        counts: [u8; 2],
        bin in 0_u64..100,
    ) {
        let _ = MegatronIndex::new(&bytes, bin);
        let mut headed = idx(8, &[], &[], &[]);
        headed[18] = counts[0] % 8;
        headed[26] = counts[1] % 8;
        headed.extend(bytes);
        if let Ok(index) = MegatronIndex::new(&headed, bin) {
            for i in 0..=index.documents() {
                let _ = index.document(i);
            }
        }
    }
}
