use std::fs;

use super::super::{Dataset, Documents, Tokens};
use super::*;

fn write(path: &std::path::Path, vocab_size: u32, documents: &[&[u32]]) {
    let mut writer = TokenFileWriter::create(path, vocab_size).unwrap();
    for document in documents {
        writer.document(document).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn every_width_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    for (vocab_size, width) in [(256_u32, 1_usize), (257, 2), (65536, 2), (65537, 4), (u32::MAX, 4)] {
        let path = folder.path().join(vocab_size.to_string());
        let (a, b) = ([vocab_size - 1, 0, 7], [vocab_size / 2; 10]);
        write(&path, vocab_size, &[&a, &[], &b]);
        let file = TokenFile::open(&path).unwrap();
        file.verify().unwrap();
        assert_eq!((file.len(), file.documents(), file.vocab_size()), (13, 3, vocab_size.into()));
        assert_eq!(file.tokens(0..3).unwrap(), a);
        assert_eq!(file.tokens(file.document(2).unwrap()).unwrap(), b);
        assert_eq!(file.document(1).unwrap(), 3..3);
        assert_eq!(fs::metadata(&path).unwrap().len() as usize, 128 + (13 * width).next_multiple_of(8) + 32);
    }
}

#[test]
fn what_is_not_there_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    write(&path, 256, &[&[1, 2, 3]]);
    let file = TokenFile::open(&path).unwrap();
    assert!(file.tokens(1..4).unwrap_err().to_string().ends_with("t: tokens 1..4 of 3"));
    assert!(file.tokens(u64::MAX - 1..u64::MAX).is_err());
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 3..1;
    assert!(file.tokens(reversed).is_err());
    assert!(file.document(1).is_err());
    assert!(file.document(u64::MAX).is_err());
    let mut writer = TokenFileWriter::create(&path, 256).unwrap();
    assert!(writer.document(&[256]).is_err());
}

#[test]
fn an_unfinished_file_leaves_the_old_one_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    write(&path, 256, &[&[1]]);
    let mut writer = TokenFileWriter::create(&path, 256).unwrap();
    writer.document(&[2, 3]).unwrap();
    drop(writer);
    assert_eq!(TokenFile::open(&path).unwrap().len(), 1);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    write(&path, 256, &[&[2, 3]]);
    assert_eq!(TokenFile::open(&path).unwrap().len(), 2);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn every_truncation_and_every_flipped_bit_is_found_and_the_file_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.bin");
    write(&path, 300, &[&[1, 2, 299], &[4, 5]]);
    let good = fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        // A new file each time: some file systems sync one that is emptied and written again.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        TokenFile::open(&path).and_then(|file| file.verify())
    };
    check(&good).unwrap();
    for length in 0..good.len() {
        let error = check(&good[..length]).expect_err("a cut-off file was accepted").to_string();
        assert!(error.contains("tokens.bin"), "{error}");
    }
    for bit in 0..8 * good.len() {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let error = check(&bad).expect_err("a flipped bit was accepted").to_string();
        assert!(error.contains("tokens.bin"), "{error}");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(check(&longer).unwrap_err().to_string().contains("extended"));
    assert!(
        check(b"some other file, long enough to hold a header and then some")
            .unwrap_err()
            .to_string()
            .contains("no token file")
    );
}

#[test]
fn a_later_version_and_absurd_sizes_are_refused() {
    let header =
        Header { width: 1, vocab_size: 256, tokens: 0, documents: 0, masked: false, content: [0; 32] };
    let mut bytes = header.to_bytes();
    bytes[8] = 3;
    let hash = blake3::hash(&bytes[..72]);
    bytes[72..104].copy_from_slice(hash.as_bytes());
    assert_eq!(Header::from_bytes(&bytes), Err(Fault::Version { found: 3 }));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    for header in [Header { tokens: u64::MAX, ..header }, Header { documents: u64::MAX, ..header }] {
        fs::write(&path, header.to_bytes()).unwrap();
        assert!(TokenFile::open(&path).is_err());
    }
}

/// What a program that means harm could write: checksums that are right, of offsets that are not.
#[test]
fn documents_outside_of_the_tokens_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    write(&path, 256, &[&[1, 2, 3, 4], &[5, 6, 7]]);
    let good = fs::read(&path).unwrap();
    for offsets in [[0, 8, 7], [0, u64::MAX, 7], [5, 4, 7], [0, 4, 8], [u64::MAX; 3]] {
        let mut bytes = good.clone();
        let at = bytes.len() - 24;
        bytes[at..].copy_from_slice(&offsets.map(u64::to_le_bytes).concat());
        let content = blake3::hash(&bytes[HEADER..]);
        bytes[40..72].copy_from_slice(content.as_bytes());
        let header = blake3::hash(&bytes[..72]);
        bytes[72..104].copy_from_slice(header.as_bytes());
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let open = || Tokens::open(&path).unwrap();
        open().verify().unwrap();
        let error = Dataset::packed(open(), 256, 5).unwrap_err().to_string();
        assert!(error.contains("t: document ") && error.ends_with("the content is damaged"), "{error}");
        // A stream has samples all the same; where documents start it may not.
        let stream = Dataset::new(open(), 256, 2).unwrap();
        assert_eq!(stream.sample(2).unwrap(), [5, 6, 7]);
        assert!((0..3).any(|i| stream.document_starts(i).is_err()));
        let _ = Documents::split(open(), 0.5);
    }
}

#[test]
fn a_mask_says_what_is_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    let mut writer = TokenFileWriter::create(&path, 300).unwrap();
    // Nine tokens before the first prompt, so that bits cross a byte.
    writer.document(&[1; 9]).unwrap();
    writer.completion(&[2, 2], &[1]).unwrap();
    writer.document(&[1, 1]).unwrap();
    writer.completion(&[2; 5], &[1; 3]).unwrap();
    assert!(writer.completion(&[2], &[300]).is_err());
    writer.finish().unwrap();
    let file = TokenFile::open(&path).unwrap();
    file.verify().unwrap();
    assert_eq!((file.len(), file.documents()), (22, 4));
    for range in [0..22, 3..17, 8..9, 22..22] {
        let learnt: Vec<bool> = file.tokens(range.clone()).unwrap().iter().map(|&token| token == 1).collect();
        assert_eq!(file.mask(range).unwrap(), learnt);
    }
    assert!(file.mask(3..23).unwrap_err().to_string().ends_with("t: tokens 3..23 of 22"));
    assert_eq!(fs::metadata(&path).unwrap().len(), 128 + 48 + 40 + 8);

    let good = fs::read(&path).unwrap();
    assert_eq!(good[8], 2);
    for bit in 0..8 * good.len() {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::remove_file(&path).unwrap();
        fs::write(&path, bad).unwrap();
        assert!(TokenFile::open(&path).and_then(|file| file.verify()).is_err(), "bit {bit}");
    }
}

/// Without a prompt files are what they were before there was a mask.
#[test]
fn files_without_a_mask_have_version_1_and_all_is_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    write(&path, 256, &[&[1, 2, 3]]);
    assert_eq!(fs::read(&path).unwrap()[8], 1);
    let file = TokenFile::open(&path).unwrap();
    assert_eq!(file.mask(0..2).unwrap(), [true, true]);
    assert!(file.mask(0..4).is_err());
}
