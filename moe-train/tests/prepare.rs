//! Corpora become tokens: those of the Python package, the same bytes for any number of threads and interruptions.

use std::fs;
use std::ops::ControlFlow::{self, Break, Continue};
use std::path::{Path, PathBuf};

use moe_train::data::{
    Corpus, DataError, DocumentFormat, Encoder, InputFormat, MAX_DOCUMENT_BYTES, PreparedCorpus, Progress,
    Stage, TokenizerKind,
};

fn always(_: &Progress) -> ControlFlow<()> {
    Continue(())
}

fn bytes() -> Encoder {
    Encoder::open(&TokenizerKind::Byte, None).unwrap()
}

/// A corpus over bytes in parts of 2000 bytes, by two threads.
fn corpus(folder: &Path, inputs: &[PathBuf]) -> Corpus {
    Corpus { threads: 2, part_bytes: Some(2000), ..Corpus::new(inputs.to_vec(), bytes(), folder.join("out")) }
}

fn write(folder: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    path
}

/// The names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[cfg(feature = "tokenizers")]
fn documents(path: &Path) -> Vec<Vec<u32>> {
    let tokens = moe_train::data::Tokens::open(path).unwrap();
    tokens.verify().unwrap();
    (0..tokens.documents()).map(|i| tokens.tokens(tokens.document(i).unwrap()).unwrap()).collect()
}

/// Lines of many lengths, some of them longer than a part, some empty; texts that are cut; and what they are made of.
fn inputs(folder: &Path) -> (Vec<PathBuf>, Vec<Vec<u8>>) {
    let (mut lines, mut wanted) = (String::new(), Vec::new());
    for i in 0..60_usize {
        let text = if i % 7 == 3 { String::new() } else { format!("{i} é\n\"").repeat(i * i % 97) };
        let line = serde_json::json!({ "id": i, "text": text, "more": { "text": [1, "no"] } });
        lines += &format!("{line}\n");
        wanted.push(text.into_bytes());
    }
    let mut long = b"one line of a text that is cut at its line ends\n".repeat(4000);
    long.extend("nö line end".repeat(9000).bytes());
    // Documents end with the last line before the limit, or with the last character.
    let mut rest = &long[..];
    while rest.len() > MAX_DOCUMENT_BYTES {
        let line = rest[..MAX_DOCUMENT_BYTES].iter().rposition(|&byte| byte == b'\n');
        let character = (0..=MAX_DOCUMENT_BYTES).rev().find(|&at| rest[at] & 0xC0 != 0x80).unwrap();
        let (document, after) = rest.split_at(line.map_or(character, |at| at + 1));
        wanted.push(document.to_vec());
        rest = after;
    }
    wanted.push(rest.to_vec());
    let files = vec![
        write(folder, "a.jsonl", &lines),
        write(folder, "b.txt", &long),
        write(folder, "c.txt", ""),
        write(folder, "d.txt", "short"),
        write(folder, "e.json", "{\"text\": \"no line end\"}"),
        write(folder, "f.jsonl", ""),
    ];
    wanted.extend([b"".to_vec(), b"short".to_vec(), b"no line end".to_vec()]);
    (files, wanted)
}

/// The file as a writer makes it of all documents that are not empty.
fn directly(format: DocumentFormat, path: &Path, wanted: &[Vec<u8>]) {
    let mut writer = format.create(path, 256).unwrap();
    for document in wanted.iter().filter(|document| !document.is_empty()) {
        writer.document(&document.iter().map(|&byte| byte.into()).collect::<Vec<u32>>()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn any_number_of_threads_and_parts_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (files, wanted) = inputs(folder.path());
    let empty = wanted.iter().filter(|document| document.is_empty()).count() as u64;
    for (format, suffixes) in
        [(DocumentFormat::Tokens, &[""][..]), (DocumentFormat::Megatron, &[".bin", ".idx", ".blake3.json"])]
    {
        let direct = folder.path().join("direct");
        directly(format, &direct, &wanted);
        for (threads, part_bytes) in [(1, 700), (7, 700), (2, 70_000), (3, 1 << 30)] {
            let corpus =
                Corpus { format, threads, part_bytes: Some(part_bytes), ..corpus(folder.path(), &files) };
            let before = names(folder.path());
            let mut last = None;
            let prepared = corpus
                .prepare(&mut |progress| {
                    assert!(progress.parts <= progress.all_parts && progress.bytes <= progress.all_bytes);
                    if progress.stage == Stage::Encode {
                        last = Some(*progress);
                    }
                    Continue(())
                })
                .unwrap();
            let last = last.unwrap();
            assert_eq!((last.parts, last.bytes), (last.all_parts, last.all_bytes));
            assert_eq!((prepared.documents, prepared.empty_documents), (wanted.len() as u64 - empty, empty));
            assert_eq!(prepared.tokens, wanted.iter().map(|document| document.len() as u64).sum::<u64>());
            assert_eq!((prepared.kept_parts, prepared.damaged_parts), (0, 0));
            for suffix in suffixes {
                let [made, direct] = ["out", "direct"]
                    .map(|name| fs::read(folder.path().join(format!("{name}{suffix}"))).unwrap());
                assert!(made == direct, "{format:?}{suffix}, {threads} threads, parts of {part_bytes}");
                fs::remove_file(folder.path().join(format!("out{suffix}"))).unwrap();
            }
            assert_eq!(names(folder.path()), before, "something was left");
        }
    }
}

/// Prepares until so many parts are complete, and no more.
fn interrupt(corpus: &Corpus, parts: usize) -> DataError {
    let mut watch = |progress: &Progress| match progress.parts >= parts {
        true => Break(()),
        false => Continue(()),
    };
    let error = Corpus { threads: 1, ..corpus.clone() }.prepare(&mut watch).unwrap_err();
    // The thread may be ahead of whoever watches it.
    let folder = corpus.out.with_extension("parts");
    let part = |i: usize| folder.join(format!("part-{i:06}.tokens"));
    assert!((0..parts).all(|i| part(i).exists()));
    for i in (parts..).take_while(|&i| part(i).exists()) {
        fs::remove_file(part(i)).unwrap();
    }
    error
}

#[test]
fn what_was_interrupted_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (files, wanted) = inputs(folder.path());
    let direct = folder.path().join("direct");
    directly(DocumentFormat::Tokens, &direct, &wanted);
    let direct = fs::read(direct).unwrap();
    let corpus = corpus(folder.path(), &files);
    let all = corpus.prepare(&mut always).unwrap();
    assert!(all.parts > 15, "{all:?}");
    fs::remove_file(&corpus.out).unwrap();
    let clean = names(folder.path());
    for parts in [1, 2, 7, all.parts - 1] {
        let error = interrupt(&corpus, parts).to_string();
        assert!(error.contains(&format!("of {} parts were complete", all.parts)), "{error}");
        assert!(!corpus.out.exists());
        let threads = 1 + parts % 4;
        let resumed = Corpus { threads, ..corpus.clone() }.prepare(&mut always).unwrap();
        assert_eq!(resumed, PreparedCorpus { kept_parts: parts, ..all });
        assert!(fs::read(&corpus.out).unwrap() == direct, "after {parts} parts");
        fs::remove_file(&corpus.out).unwrap();
        assert_eq!(names(folder.path()), clean);
    }

    // In the join, when all parts are there; a killed one leaves its unfinished file.
    let mut watch = |progress: &Progress| match progress.stage == Stage::Join && progress.parts == 3 {
        true => Break(()),
        false => Continue(()),
    };
    corpus.prepare(&mut watch).unwrap_err();
    write(folder.path(), "out.tmp-0123456789ab", "unfinished");
    write(folder.path(), "out.tmp-mine", "not ours");
    fs::create_dir(folder.path().join("out.parts.tmp-0123456789ab")).unwrap();
    write(&folder.path().join("out.parts.tmp-0123456789ab"), "part-000007.tokens", "half removed");
    let resumed = corpus.prepare(&mut always).unwrap();
    assert_eq!(resumed.kept_parts, all.parts);
    assert!(fs::read(&corpus.out).unwrap() == direct);
    let left: Vec<_> = names(folder.path()).into_iter().filter(|name| name.contains("tmp")).collect();
    assert_eq!(left, ["out.tmp-mine"]);
}

#[test]
fn a_damaged_part_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = inputs(folder.path());
    let corpus = corpus(folder.path(), &files);
    corpus.prepare(&mut always).unwrap();
    let whole = fs::read(&corpus.out).unwrap();
    for damage in [
        |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 8),
        |bytes: &mut Vec<u8>| bytes.clear(),
        |bytes: &mut Vec<u8>| bytes[129] ^= 1,
    ] {
        interrupt(&corpus, 4);
        let part = folder.path().join("out.parts/part-000002.tokens");
        let mut bytes = fs::read(&part).unwrap();
        damage(&mut bytes);
        fs::write(&part, bytes).unwrap();
        let prepared = corpus.prepare(&mut always).unwrap();
        assert_eq!((prepared.kept_parts, prepared.damaged_parts), (3, 1));
        assert!(fs::read(&corpus.out).unwrap() == whole);
    }
}

#[test]
fn parts_of_something_else_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (files, _) = inputs(folder.path());
    let corpus = corpus(folder.path(), &files);
    interrupt(&corpus, 2);
    let before = names(&folder.path().join("out.parts"));
    let refused = |other: Corpus, what: &str| {
        let error = other.prepare(&mut always).unwrap_err().to_string();
        let parts = folder.path().join("out.parts");
        assert!(error.starts_with(&format!("{} has parts of ", parts.display())), "{error}");
        assert!(error.contains(what) && error.contains("remove the folder to begin anew"), "{error}");
        assert_eq!(names(&parts), before);
    };
    let of = |files: &[PathBuf]| Corpus { inputs: files.to_vec(), ..corpus.clone() };
    refused(of(&files[..3]), "of 6 inputs; there are 3 now");
    refused(of(&[&files[1..], &files[..1]].concat()), "a.jsonl, where ");
    refused(
        Corpus { field: "body".to_owned(), ..corpus.clone() },
        "the field \"text\", which is \"body\" now",
    );
    refused(
        Corpus { format: DocumentFormat::Megatron, ..corpus.clone() },
        "the format Tokens, which is Megatron now",
    );
    refused(
        Corpus { input_format: Some(InputFormat::Text), ..corpus.clone() },
        "as Jsonl, which is Text now",
    );
    refused(Corpus { part_bytes: Some(1999), ..corpus.clone() }, "parts of another size");
    #[cfg(feature = "tokenizers")]
    refused(Corpus { encoder: fixture(), ..corpus.clone() }, "another tokenizer");

    let file = |path: &Path| fs::File::options().append(true).open(path).unwrap();
    let modified = fs::metadata(&files[3]).unwrap().modified().unwrap();
    file(&files[3]).set_modified(modified + std::time::Duration::from_secs(1)).unwrap();
    refused(corpus.clone(), "d.txt before it was modified");
    file(&files[3]).set_len(4).unwrap();
    refused(corpus.clone(), "d.txt when it had 5 bytes; it has 4 now");
    fs::write(&files[3], "short").unwrap();
    file(&files[3]).set_modified(modified).unwrap();
    corpus.prepare(&mut always).unwrap();

    // A folder of something else is left alone; one whose manifest was never written is not.
    let parts = folder.path().join("out.parts");
    fs::create_dir(&parts).unwrap();
    write(&parts, "part-000000.tokens", "?");
    write(&parts, "manifest.json.tmp-0123456789ab", "{");
    corpus.prepare(&mut always).unwrap();
    fs::create_dir(&parts).unwrap();
    write(&parts, "thesis.txt", "precious");
    let error = corpus.prepare(&mut always).unwrap_err().to_string();
    assert!(error.contains("out.parts has parts of something else (it has thesis.txt)"), "{error}");
    write(&parts, "manifest.json", "{}");
    let error = corpus.prepare(&mut always).unwrap_err().to_string();
    assert!(error.contains("something else (manifest.json: missing field"), "{error}");
    assert_eq!(fs::read(parts.join("thesis.txt")).unwrap(), b"precious");
}

#[test]
fn what_cannot_be_read_is_named_by_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let refused = |inputs: &[PathBuf], what: &str| {
        // The first of several faults, whichever thread is first.
        for threads in [1, 4] {
            let error = Corpus { threads, ..corpus(path, inputs) }.prepare(&mut always).unwrap_err();
            assert!(error.to_string().ends_with(what), "{error}");
            let _ = fs::remove_dir_all(path.join("out.parts"));
        }
        assert!(!path.join("out").exists());
    };
    let good = "{\"text\": \"a good line, of which there are many\"}\n";
    for (bad, what) in [
        ("", "an empty line"),
        (" \r", "an empty line"),
        ("{\"body\": \"a\"}", "missing field `text` (column 13)"),
        ("{\"text\": 7}", "invalid type: integer `7`, expected a string (column 10)"),
        ("[\"a\"]", "invalid type: sequence, expected a JSON object (column 0)"),
        ("{\"text\": \"a\"} {}", "trailing characters (column 15)"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "two fields `text` (column 20)"),
        ("{\"text\": \"\\ud800\"}", "unexpected end of hex escape (column 17)"),
        ("{\"text\": \"a", "EOF while parsing a string (column 11)"),
    ] {
        // Far behind the start of its part, and in a later one; another fault comes after it.
        let lines = [&good.repeat(40), bad, "\n", &good.repeat(30), "?\n", good].concat();
        let file = write(path, "bad.jsonl", lines);
        refused(&[file], &format!("bad.jsonl:41: {what}"));
    }
    let mut bytes = good.repeat(40).into_bytes();
    bytes.extend(b"{\"text\": \"\xff\"}\n");
    let file = write(path, "bad.jsonl", &bytes);
    refused(&[file], "bad.jsonl:41: no UTF-8 at byte 10 of the line");

    refused(&[path.join("gone.txt")], "gone.txt: No such file or directory (os error 2)");
    refused(&[path.to_owned()], "it is no file: name the files themselves");
    let empty = [write(path, "a.txt", ""), write(path, "b.jsonl", "{\"text\": null}\n{\"text\": \"\"}")];
    refused(&empty, "no document has a text (3 empty ones): nothing is written");
    fs::create_dir(path.join("taken")).unwrap();
    let taken = Corpus { out: path.join("taken"), ..corpus(path, &empty) };
    assert!(taken.prepare(&mut always).unwrap_err().to_string().contains("cannot write"));
}

#[cfg(not(feature = "parquet"))]
#[test]
fn without_the_feature_parquet_is_refused_by_name() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/parquet/texts.parquet");
    let folder = tempfile::tempdir().unwrap();
    let error = corpus(folder.path(), &[file.into()]).prepare(&mut always).unwrap_err().to_string();
    assert!(error.contains("texts.parquet") && error.ends_with("without the feature `parquet`"), "{error}");
}

#[cfg(feature = "tokenizers")]
const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer");

#[cfg(feature = "tokenizers")]
fn fixture() -> Encoder {
    Encoder::open(&TokenizerKind::File(TOKENIZER.into()), None).unwrap()
}

/// Texts, and their tokens by the Python package: with what the template puts before them, and the token 1 that ends them.
#[cfg(feature = "tokenizers")]
fn expected() -> Vec<(String, Vec<u32>)> {
    let expected = fs::read(Path::new(TOKENIZER).join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
    let case = |case: &serde_json::Value| {
        let mut ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        if ids.last() != Some(&1) {
            ids.push(1);
        }
        (case["text"].as_str().unwrap().to_owned(), ids)
    };
    let cases: Vec<_> = expected["cases"].as_array().unwrap().iter().map(case).collect();
    assert!(cases.len() > 10 && cases[0].0.is_empty());
    cases
}

#[cfg(feature = "tokenizers")]
#[test]
fn tokens_are_those_of_the_python_package() {
    let folder = tempfile::tempdir().unwrap();
    let (cases, mut files, mut lines) = (expected(), Vec::new(), String::new());
    for (i, (text, _)) in cases.iter().enumerate() {
        files.push(write(folder.path(), &format!("{i:02}.txt"), text));
        lines += &format!("{}\n", serde_json::json!({ "body": text, "text": "another" }));
    }
    let lines = write(folder.path(), "lines.jsonl", lines);
    let wanted: Vec<Vec<u32>> = cases.into_iter().skip(1).map(|(_, ids)| ids).collect();
    for (inputs, field) in [(files, "text"), (vec![lines], "body")] {
        for format in [DocumentFormat::Tokens, DocumentFormat::Megatron] {
            let (encoder, field) = (fixture(), field.to_owned());
            let corpus = Corpus { encoder, field, format, ..corpus(folder.path(), &inputs) };
            assert_eq!(corpus.prepare(&mut always).unwrap().empty_documents, 1);
            assert_eq!(documents(&corpus.out), wanted);
            if format == DocumentFormat::Tokens {
                fs::remove_file(&corpus.out).unwrap();
            }
        }
    }

    // A text that is no UTF-8, in its second document.
    let mut text = b"0123456789abcde\n".repeat(MAX_DOCUMENT_BYTES / 16);
    text.extend(b"ab\xffc");
    let file = write(folder.path(), "bad.txt", &text);
    let error = Corpus { encoder: fixture(), ..corpus(folder.path(), &[file]) }.prepare(&mut always);
    assert!(error.unwrap_err().to_string().ends_with("bad.txt: no UTF-8 at byte 65538"));
}

#[cfg(feature = "parquet")]
mod parquet {
    use super::*;

    fn file(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(name)
    }

    #[cfg(feature = "tokenizers")]
    #[test]
    fn columns_of_strings_are_documents() {
        let folder = tempfile::tempdir().unwrap();
        let wanted: Vec<Vec<u32>> = expected().into_iter().skip(1).map(|(_, ids)| ids).collect();
        // A null behind each text; all texts seven times.
        for (name, times, empty) in [("texts.parquet", 1, 12), ("required.parquet", 7, 7)] {
            for (threads, part_bytes) in [(3, 1), (1, 1 << 20)] {
                let corpus = Corpus {
                    encoder: fixture(),
                    threads,
                    part_bytes: Some(part_bytes),
                    ..corpus(folder.path(), &[file(name)])
                };
                let mut last = None;
                let mut watch = |progress: &Progress| {
                    last = Some(*progress);
                    Continue(())
                };
                let prepared = corpus.prepare(&mut watch).unwrap();
                assert_eq!(prepared.empty_documents, empty);
                assert_eq!(documents(&corpus.out), vec![&wanted[..]; times].concat());
                assert_eq!(last.unwrap().bytes, last.unwrap().all_bytes);
            }
        }
    }

    #[test]
    fn other_columns_and_rows_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str, field: &str, what: &str| {
            let corpus = Corpus { field: field.to_owned(), ..corpus(folder.path(), &[file(name)]) };
            let error = corpus.prepare(&mut always).unwrap_err().to_string();
            assert!(error.ends_with(what), "{error}");
        };
        let columns = "it has no column `body` of strings, but id, words.list.element, text, n";
        refused("texts.parquet", "body", columns);
        refused("texts.parquet", "n", "the column `n` is not of strings, but of INT64");
        refused("texts.parquet", "words", &columns.replace("body", "words"));
        refused("binary.parquet", "text", "binary.parquet: row 3, counted from 0: no UTF-8 at byte 2");
    }

    /// No truncation and no flipped bit of a file is a panic that is not caught, or goes on for ever.
    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(file("texts.parquet")).unwrap();
        let prepare = |bytes: &[u8]| {
            let input = write(folder.path(), "damaged.parquet", bytes);
            let prepared = corpus(folder.path(), &[input]).prepare(&mut always);
            let _ = fs::remove_dir_all(folder.path().join("out.parts"));
            prepared
        };
        prepare(&whole).unwrap();
        for len in (0..whole.len()).step_by(101) {
            let error = prepare(&whole[..len]).unwrap_err().to_string();
            assert!(error.contains("damaged.parquet: "), "{error}");
        }
        let mut refused = 0;
        for at in (0..whole.len()).step_by(23) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            // A letter of a text may be another one.
            if let Err(error) = prepare(&bytes) {
                assert!(error.to_string().contains("damaged.parquet: "), "{error}");
                refused += 1;
            }
        }
        assert!(refused > 50, "{refused}");
    }
}
