use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::DType;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn spec(tensor: &str, dims: [usize; 2], rows: [usize; 2], cols: [usize; 2], part: [usize; 2]) -> PieceSpec {
    PieceSpec {
        tensor: tensor.into(),
        kind: "param".into(),
        dtype: DType::F32,
        dims,
        rows: rows[0]..rows[1],
        cols: cols[0]..cols[1],
        part: part[0]..part[1],
    }
}

/// A matrix of which no two elements are alike.
fn matrix(dims: [usize; 2]) -> Vec<u8> {
    (0..dims[0] * dims[1]).flat_map(|i| (i as f32 + 0.25).to_le_bytes()).collect()
}

/// The bytes of a piece of `matrix`, element by element.
fn cut(spec: &PieceSpec) -> Vec<u8> {
    let whole = matrix(spec.dims);
    let elements =
        spec.rows.clone().flat_map(|row| spec.cols.clone().map(move |col| row * spec.dims[1] + col));
    let mut bytes = Vec::new();
    for element in elements.skip(spec.part.start).take(spec.part.len()) {
        bytes.extend_from_slice(&whole[4 * element..4 * element + 4]);
    }
    bytes
}

fn save(root: &Path, step: u64, ranks: &[Vec<PieceSpec>]) -> Result<PathBuf, CheckpointError> {
    let pending = PendingCheckpoint::create(root, step)?;
    let mut files = Vec::new();
    for (rank, specs) in ranks.iter().enumerate() {
        let mut writer = PieceWriter::create(pending.folder(), rank)?;
        for spec in specs {
            writer.write(spec.clone(), &cut(spec))?;
        }
        files.push(writer.finish()?);
    }
    pending.commit(files, json!({"cursor": 8 * step, "lr": 0.1}))
}

/// Two tensors over three ranks: one cut by columns and again inside of its blocks, one whole.
fn ranks() -> Vec<Vec<PieceSpec>> {
    vec![
        vec![spec("a", [3, 5], [0, 3], [0, 2], [0, 4]), spec("b", [1, 3], [0, 1], [0, 3], [0, 3])],
        vec![spec("a", [3, 5], [0, 3], [2, 5], [0, 9])],
        vec![spec("a", [3, 5], [0, 3], [0, 2], [4, 6])],
    ]
}

fn silent() -> impl FnMut(&CheckpointError) {
    |_: &CheckpointError| ()
}

fn entries(root: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn pieces_of_several_writers_make_whole_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 7, &ranks()).unwrap();
    assert_eq!(entries(folder.path()), ["LATEST", "step-7"]);
    assert_eq!(fs::read_to_string(folder.path().join("LATEST")).unwrap(), "step-7\n");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.verify().is_empty());
    assert_eq!((checkpoint.step(), checkpoint.writers(), checkpoint.bytes()), (7, 3, 4 * 18));
    assert_eq!(checkpoint.meta(), &json!({"cursor": 56, "lr": 0.1}));
    let names: Vec<_> = checkpoint.tensors().map(|t| (t.name, t.kind, t.dtype, t.dims)).collect();
    assert_eq!(names, [("a", "param", DType::F32, [3, 5]), ("b", "param", DType::F32, [1, 3])]);
    for (name, dims) in [("a", [3, 5]), ("b", [1, 3])] {
        assert_eq!(checkpoint.read_tensor(name, "param").unwrap(), matrix(dims));
    }
    for (rows, cols) in [(1..3, 1..4), (0..1, 0..5), (2..3, 4..5), (1..1, 0..5), (0..3, 2..5)] {
        let block =
            spec("a", [3, 5], [rows.start, rows.end], [cols.start, cols.end], [0, rows.len() * cols.len()]);
        assert_eq!(checkpoint.read_block("a", "param", rows, cols).unwrap(), cut(&block));
    }
    assert!(matches!(checkpoint.read_block("a", "param", 0..4, 0..1), Err(CheckpointError::NoBlock { .. })));
    assert!(matches!(checkpoint.read_tensor("a", "m"), Err(CheckpointError::NoTensor { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any grid of blocks, each cut anywhere, over any number of writers, reads back whole.
    #[test]
    fn any_cutting_reads_back(
        dims in [1_usize..9, 1_usize..9], row_cuts in [0_usize..9, 0_usize..9], col_cut in 0_usize..9,
        part_cuts in [0_usize..81, 0_usize..81], writers in 1_usize..4,
    ) {
        let bounds = |mut cuts: Vec<usize>, len: usize| {
            cuts.extend([0, len]);
            cuts.retain(|&c| c <= len);
            cuts.sort();
            cuts.dedup();
            cuts
        };
        let mut ranks = vec![Vec::new(); writers];
        let mut next = 0;
        for r in bounds(row_cuts.to_vec(), dims[0]).windows(2) {
            for c in bounds(vec![col_cut], dims[1]).windows(2) {
                for p in bounds(part_cuts.to_vec(), (r[1] - r[0]) * (c[1] - c[0])).windows(2) {
                    let piece = spec("t", dims, [r[0], r[1]], [c[0], c[1]], [p[0], p[1]]);
                    ranks[next % writers].push(piece);
                    next += 1;
                }
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&save(folder.path(), 1, &ranks).unwrap()).unwrap();
        prop_assert_eq!(checkpoint.read_tensor("t", "param").unwrap(), matrix(dims));
    }
}

#[test]
fn what_is_missing_or_there_twice_is_never_committed() {
    let folder = tempfile::tempdir().unwrap();
    let row = |r, part| spec("t", [2, 3], [r, r + 1], [0, 3], part);
    for (pieces, what) in [
        (vec![row(0, [0, 3])], "3 of 6 elements are missing"),
        (vec![row(0, [0, 3]), row(1, [0, 2])], "elements 2..3 of block [1..2, 0..3] are missing"),
        (vec![row(0, [0, 3]), row(1, [1, 3])], "elements 0..1 of block [1..2, 0..3] are missing"),
        (
            vec![row(0, [0, 3]), row(1, [0, 3]), row(1, [0, 3])],
            "elements 0..3 of block [1..2, 0..3] are there twice",
        ),
        (
            vec![row(0, [0, 3]), row(1, [0, 2]), row(1, [1, 3])],
            "elements 1..2 of block [1..2, 0..3] are there twice",
        ),
        (vec![row(0, [0, 3]), spec("t", [2, 3], [0, 2], [0, 3], [0, 6])], "overlap"),
        (
            vec![spec("t", [2, 3], [0, 2], [0, 2], [0, 4]), spec("t", [2, 3], [1, 2], [1, 3], [0, 2])],
            "overlap",
        ),
        (vec![row(0, [0, 3]), spec("t", [2, 4], [1, 2], [0, 3], [0, 3])], "[2, 3] f32 and [2, 4] f32"),
    ] {
        let error = save(folder.path(), 1, &[pieces]).unwrap_err().to_string();
        assert!(error.contains("param of t: ") && error.contains(what), "{error}");
        assert_eq!(entries(folder.path()), [""; 0]);
    }
}

#[test]
fn pieces_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = PieceWriter::create(folder.path(), 0).unwrap();
    for (bad, bytes) in [
        (spec("t", [2, 3], [0, 2], [0, 3], [0, 6]), 23),
        (spec("t", [2, 3], [0, 3], [0, 3], [0, 6]), 24),
        (spec("t", [2, 3], [0, 2], [0, 3], [0, 7]), 28),
        (spec("t", [2, 3], [0, 2], [0, 3], [2, 2]), 0),
        (spec("t", [2, 3], [1, 1], [0, 3], [0, 0]), 0),
        (spec("t", [usize::MAX, 2], [0, 1], [0, 2], [0, 2]), 8),
    ] {
        assert!(matches!(writer.write(bad, &vec![0; bytes]), Err(CheckpointError::Piece { .. })));
    }
    assert!(PieceWriter::create(folder.path(), 0).is_err(), "two writers of one number");
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 3, &ranks()).unwrap();
    let manifest = fs::read(path.join("manifest.json")).unwrap();
    assert!(matches!(save(folder.path(), 3, &ranks()), Err(CheckpointError::Exists { .. })));
    assert_eq!(fs::read(path.join("manifest.json")).unwrap(), manifest);

    // One that appears while another is being written, even an empty folder.
    let pending = PendingCheckpoint::create(folder.path(), 4).unwrap();
    fs::create_dir(folder.path().join("step-4")).unwrap();
    assert!(matches!(pending.commit(vec![], json!(null)), Err(CheckpointError::Exists { .. })));
    assert_eq!(entries(folder.path()), ["LATEST", "step-3", "step-4"]);
}

#[test]
fn a_crash_before_the_rename_leaves_the_older_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 3, &ranks()).unwrap();
    let pending = PendingCheckpoint::create(folder.path(), 4).unwrap();
    PieceWriter::create(pending.folder(), 0).unwrap().finish().unwrap();
    std::mem::forget(pending);
    assert_eq!(entries(folder.path()).len(), 3);
    assert_eq!(list(folder.path()).unwrap().len(), 1);
    assert_eq!(open_newest(folder.path(), &mut silent()).unwrap().step(), 3);
    save(folder.path(), 4, &ranks()).unwrap();
    assert_eq!(entries(folder.path()), ["LATEST", "step-3", "step-4"]);
}

/// All files of a checkpoint with their content.
fn files(path: &Path) -> Vec<(String, Vec<u8>)> {
    entries(path).into_iter().map(|name| (name.clone(), fs::read(path.join(name)).unwrap())).collect()
}

/// Replaces one file of a checkpoint, checks that this is found with `names` in the message, and puts it back.
fn damage(path: &Path, file: &str, good: &[u8], bad: &[u8], names: &[&str]) {
    let target = path.join(file);
    // A new file each time: some file systems sync one that is emptied and written again.
    fs::remove_file(&target).unwrap();
    fs::write(&target, bad).unwrap();
    let faults = match Checkpoint::open(path) {
        Ok(checkpoint) => checkpoint.verify(),
        Err(error) => vec![error],
    };
    let text = faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(!faults.is_empty(), "damage to {file} was accepted");
    assert!(names.iter().any(|name| text.contains(name)), "{file} is not named: {text}");
    fs::remove_file(&target).unwrap();
    fs::write(&target, good).unwrap();
}

#[test]
fn every_truncation_and_every_flipped_bit_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 7, &ranks()).unwrap();
    for (name, good) in files(&path) {
        for length in 0..good.len() {
            damage(&path, &name, &good, &good[..length], &[&name]);
        }
        for bit in 0..8 * good.len() {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            damage(&path, &name, &good, &bad, &[&name]);
        }
        let longer = [&good[..], &[0]].concat();
        damage(&path, &name, &good, &longer, &[&name]);
    }
    assert!(Checkpoint::open(&path).unwrap().verify().is_empty());
}

#[test]
fn damage_names_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 7, &ranks()).unwrap();
    let good = fs::read(path.join("rank-00000.bin")).unwrap();
    // Four elements of a, then three of b.
    for (byte, tensor) in [(0, "param of a"), (15, "param of a"), (16, "param of b"), (27, "param of b")] {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        damage(&path, "rank-00000.bin", &good, &bad, &[tensor]);
    }
    damage(&path, "rank-00000.bin", &good, &good[..15], &["a is cut off"]);
    damage(&path, "rank-00000.bin", &good, &good[..16], &["b is cut off"]);

    fs::write(path.join("rank-00001.bin"), [0; 36]).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let error = checkpoint.read_tensor("a", "param").unwrap_err().to_string();
    assert!(error.contains("param of a is damaged in rank-00001.bin at byte 0"), "{error}");
    assert_eq!(checkpoint.read_tensor("b", "param").unwrap(), matrix([1, 3]));
    // The damaged piece is not needed for this block.
    assert!(checkpoint.read_block("a", "param", 0..3, 0..2).is_ok());
}

#[test]
fn missing_swapped_and_foreign_files_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let pieces = |tensor: &str| vec![spec(tensor, [1, 3], [0, 1], [0, 3], [0, 3])];
    let path = save(folder.path(), 1, &[pieces("e0"), pieces("e1")]).unwrap();
    let (a, b) = (path.join("rank-00000.bin"), path.join("rank-00001.bin"));
    // The same bytes in both would be no fault; make them differ by saving another matrix.
    let other: Vec<u8> = cut(&pieces("e0")[0]).iter().rev().copied().collect();
    let pending = PendingCheckpoint::create(folder.path(), 2).unwrap();
    let mut written = Vec::new();
    for (rank, data) in [cut(&pieces("e0")[0]), other].iter().enumerate() {
        let mut writer = PieceWriter::create(pending.folder(), rank).unwrap();
        writer.write(pieces(&format!("e{rank}"))[0].clone(), data).unwrap();
        written.push(writer.finish().unwrap());
    }
    let second = pending.commit(written, json!(null)).unwrap();
    fs::rename(second.join("rank-00000.bin"), second.join("x")).unwrap();
    fs::rename(second.join("rank-00001.bin"), second.join("rank-00000.bin")).unwrap();
    fs::rename(second.join("x"), second.join("rank-00001.bin")).unwrap();
    assert_eq!(Checkpoint::open(&second).unwrap().verify().len(), 2, "swapped expert files");

    fs::copy(&a, path.join("rank-00002.bin")).unwrap();
    fs::write(path.join(".DS_Store"), "x").unwrap();
    let faults = Checkpoint::open(&path).unwrap().verify();
    assert!(matches!(&faults[..], [CheckpointError::Unlisted { file, .. }] if file == "rank-00002.bin"));
    fs::remove_file(&b).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("rank-00001.bin"));
}

#[test]
fn a_renamed_checkpoint_is_refused_as_another_step() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 1, &ranks()).unwrap();
    let moved = folder.path().join("step-2");
    fs::rename(&path, &moved).unwrap();
    let error = Checkpoint::open(&moved).unwrap_err().to_string();
    assert!(error.contains("is of step 1, but the folder is named step-2"), "{error}");
    let kept = folder.path().join("best");
    fs::rename(&moved, &kept).unwrap();
    assert_eq!(Checkpoint::open(&kept).unwrap().step(), 1);
}

#[test]
fn the_newest_whole_one_is_opened_and_the_others_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    assert!(matches!(open_newest(root, &mut silent()), Err(CheckpointError::None { .. })));
    for step in [2, 10, 9] {
        save(root, step, &ranks()).unwrap();
    }
    for nonsense in ["", "step-77\n", "\u{0}", "../../etc"] {
        fs::write(root.join("LATEST"), nonsense).unwrap();
        assert_eq!(open_newest(root, &mut silent()).unwrap().step(), 10);
    }
    fs::create_dir(root.join("step-11")).unwrap();
    fs::create_dir(root.join("step-012")).unwrap();
    fs::write(root.join("step-10/rank-00001.bin"), [0; 36]).unwrap();
    let mut told = Vec::new();
    assert_eq!(open_newest(root, &mut |fault| told.push(fault.to_string())).unwrap().step(), 9);
    assert!(told[0].contains("step-11") && told[1].contains("step-10") && told.len() == 2, "{told:?}");
    for step in [2, 9] {
        fs::remove_file(step_folder(root, step).join("manifest.json")).unwrap();
    }
    assert!(matches!(open_newest(root, &mut silent()), Err(CheckpointError::NoneValid { tried: 4, .. })));
}

#[test]
fn pruning_keeps_the_newest_whole_ones() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for step in [1, 2, 3, 4] {
        save(root, step, &ranks()).unwrap();
    }
    fs::write(root.join("step-4/manifest.json"), "{}").unwrap();
    assert_eq!(prune(root, 2).unwrap(), [root.join("step-1")]);
    assert_eq!(entries(root), ["LATEST", "step-2", "step-3", "step-4"]);
    assert_eq!(prune(root, 2).unwrap(), [""; 0].map(PathBuf::from));
}

/// A checkpoint that version 0.1.0 wrote: it must load forever.
#[test]
fn a_checkpoint_of_format_1_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-1/step-7");
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.verify().is_empty());
    assert_eq!((checkpoint.step(), checkpoint.writers()), (7, 3));
    assert_eq!(checkpoint.meta(), &json!({"cursor": 56, "lr": 0.1}));
    assert_eq!(checkpoint.read_tensor("a", "param").unwrap(), matrix([3, 5]));
    assert_eq!(checkpoint.read_tensor("b", "param").unwrap(), matrix([1, 3]));
}

#[test]
fn a_later_version_is_refused_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), 1, &ranks()).unwrap();
    let target = path.join("manifest.json");
    let text = fs::read_to_string(&target).unwrap();
    let start = text.find("\"manifest\":").unwrap() + 11;
    let body = text[start..text.len() - 2].replacen("\"version\":1", "\"version\":2,\"new\":0", 1);
    let hash = blake3::hash(body.as_bytes()).to_hex();
    fs::write(&target, format!("{{\"blake3\":\"{hash}\",\"manifest\":{body}}}\n")).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("is of version 2, but this program reads version 1"), "{error}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["manifest"]["step"], 1);
}
