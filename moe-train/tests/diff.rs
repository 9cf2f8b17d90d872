//! What is the same, what differs, where and by how much.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use moe_train::diff::{Comparison, TensorDiff, Tensors, compare};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// A tensor to write.
struct Tensor(&'static str, Dtype, Vec<usize>, Vec<u8>);

fn doubles(name: &'static str, shape: &[usize], values: &[f64]) -> Tensor {
    Tensor(name, Dtype::F64, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn singles(name: &'static str, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor(name, Dtype::F32, shape.to_vec(), values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

fn write(path: &Path, tensors: &[Tensor]) -> PathBuf {
    let views = tensors.iter().map(|Tensor(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
    path.to_owned()
}

fn comparison(a: &Path, b: &Path) -> Comparison {
    compare(&Tensors::open(a).unwrap(), &Tensors::open(b).unwrap()).unwrap()
}

/// The comparison of one tensor of each side.
fn one(a: Tensor, b: Tensor) -> TensorDiff {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = [("a", a), ("b", b)].map(|(name, tensor)| write(&folder.path().join(name), &[tensor]));
    let Comparison { mut tensors, only_a, only_b } = comparison(&a, &b);
    assert!(only_a.is_empty() && only_b.is_empty() && tensors.len() == 1);
    tensors.remove(0)
}

#[test]
fn the_worst_place_and_both_values() {
    let diff = one(
        doubles("x", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, -8.0]),
        doubles("x", &[2, 3], &[1.0, 2.0, 3.5, 4.0, 4.0, -8.0]),
    );
    let worst = diff.worst.clone().unwrap();
    assert_eq!(
        (worst.max_abs, worst.relative, &*worst.at, worst.values),
        (1.0, 0.125, &[1, 1][..], [5.0, 4.0])
    );
    assert!(!diff.identical && diff.within(0.125) && !diff.within(0.124) && !diff.within(0.0));
}

#[test]
fn bits_count_where_nothing_is_tolerated() {
    let same = one(singles("x", &[2], &[f32::NAN, -0.0]), singles("x", &[2], &[f32::NAN, -0.0]));
    assert!(same.identical && same.within(0.0) && same.worst.is_none());
    let signs = one(singles("x", &[2], &[1.0, 0.0]), singles("x", &[2], &[1.0, -0.0]));
    assert!(!signs.within(0.0) && signs.within(1e-300));
    assert_eq!(signs.worst.unwrap().max_abs, 0.0);
    // The values are the same, the types are not.
    let types = one(singles("x", &[2], &[1.5, -2.0]), doubles("x", &[2], &[1.5, -2.0]));
    assert!(!types.within(0.0) && types.within(1e-300));
}

#[test]
fn what_is_no_number_is_the_worst() {
    let nan = one(doubles("x", &[3], &[1.0, f64::NAN, 9.0]), doubles("x", &[3], &[1.0, 2.0, 3.0]));
    assert!(!nan.within(f64::MAX));
    let worst = nan.worst.unwrap();
    assert_eq!((worst.max_abs, &*worst.at, worst.values[1]), (f64::INFINITY, &[1][..], 2.0));
    assert!(worst.values[0].is_nan());
    let both = one(doubles("x", &[2], &[f64::NAN, 1.0]), doubles("x", &[2], &[f64::NAN, 2.0]));
    assert_eq!(both.worst.unwrap().at, [1]);
    let infinite = one(doubles("x", &[2], &[f64::INFINITY, 1.0]), doubles("x", &[2], &[f64::INFINITY, 2.0]));
    assert_eq!(infinite.worst.unwrap().relative, 0.5, "the largest finite number is the measure");
    let zeros = one(doubles("x", &[2], &[0.0, 1e-300]), doubles("x", &[2], &[0.0, 0.0]));
    assert!(!zeros.within(1.0));
}

#[test]
fn shapes_and_types() {
    let shapes = one(doubles("x", &[2, 3], &[0.0; 6]), doubles("x", &[3, 2], &[0.0; 6]));
    assert!(shapes.worst.is_none() && !shapes.within(1.0));
    let empty = one(doubles("x", &[0, 3], &[]), doubles("x", &[0, 3], &[]));
    assert!(empty.identical);
    let empty = one(doubles("x", &[0, 3], &[]), singles("x", &[0, 3], &[]));
    assert!(empty.worst.is_none() && !empty.within(0.0));

    // The numbers 1, −2 and 3 (in unsigned types 1, 2 and 4) beside doubles 1, 2 and 3.
    let bytes = |elements: &[&[u8]]| elements.concat();
    for (dtype, bytes, difference) in [
        (
            Dtype::BF16,
            bytes(&[1.0, -2.0, 3.0].map(|x| bf16::from_f64(x).to_le_bytes()).each_ref().map(|x| &x[..])),
            4.0,
        ),
        (
            Dtype::F16,
            bytes(&[1.0, -2.0, 3.0].map(|x| f16::from_f64(x).to_le_bytes()).each_ref().map(|x| &x[..])),
            4.0,
        ),
        (Dtype::I64, [1i64, -2, 3].iter().flat_map(|x| x.to_le_bytes()).collect(), 4.0),
        (Dtype::I32, [1i32, -2, 3].iter().flat_map(|x| x.to_le_bytes()).collect(), 4.0),
        (Dtype::I16, [1i16, -2, 3].iter().flat_map(|x| x.to_le_bytes()).collect(), 4.0),
        (Dtype::I8, [1i8, -2, 3].iter().flat_map(|x| x.to_le_bytes()).collect(), 4.0),
        (Dtype::U64, [1u64, 2, 4].iter().flat_map(|x| x.to_le_bytes()).collect(), 1.0),
        (Dtype::U32, [1u32, 2, 4].iter().flat_map(|x| x.to_le_bytes()).collect(), 1.0),
        (Dtype::U16, [1u16, 2, 4].iter().flat_map(|x| x.to_le_bytes()).collect(), 1.0),
        (Dtype::U8, vec![1, 2, 4], 1.0),
    ] {
        let diff = one(Tensor("x", dtype, vec![3], bytes), doubles("x", &[3], &[1.0, 2.0, 3.0]));
        assert_eq!(diff.worst.unwrap().max_abs, difference, "{dtype:?}");
    }
}

/// The worst is behind several blocks of what is read at a time, which are not as many on both sides.
#[test]
fn tensors_larger_than_a_block() {
    let n = 700_001;
    let mut a: Vec<f64> = (0..n).map(|i| f64::from((i % 1000) as f32 / 7.0)).collect();
    let b: Vec<f32> = a.iter().map(|&x| x as f32).collect();
    a[n - 2] += 3.0;
    a[17] += 2.0;
    let worst = one(doubles("x", &[n], &a), singles("x", &[n], &b)).worst.unwrap();
    assert_eq!((worst.max_abs, &*worst.at), (3.0, &[n - 2][..]));
    let same = one(doubles("x", &[n], &a), doubles("x", &[n], &a));
    assert!(same.identical);
}

#[test]
fn the_worst_comes_first_and_names_of_one_side_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let a = write(
        &folder.path().join("a"),
        &[
            doubles("near", &[2], &[1.0, 2.0 + 1e-9]),
            doubles("far", &[2], &[1.0, 3.0]),
            doubles("shape", &[1], &[1.0]),
            doubles("same", &[1], &[4.0]),
            doubles("old", &[1], &[4.0]),
        ],
    );
    let b = write(
        &folder.path().join("b"),
        &[
            doubles("near", &[2], &[1.0, 2.0]),
            singles("far", &[2], &[1.0, 2.0]),
            doubles("shape", &[2], &[1.0, 1.0]),
            doubles("same", &[1], &[4.0]),
            doubles("new", &[1], &[4.0]),
        ],
    );
    let comparison = comparison(&a, &b);
    let names: Vec<&str> = comparison.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["shape", "far", "near", "same"]);
    assert_eq!(
        (&*comparison.only_a, &*comparison.only_b),
        (&["old".to_owned()][..], &["new".to_owned()][..])
    );
    assert_eq!((comparison.differing(0.0), comparison.differing(1e-6)), (5, 4));
    assert_eq!(
        comparison.table(1e-6, 2).to_string(),
        "   tensor  type and shape  max abs  relative  at   A    B\n\
         !  shape   F64 [1]/[2]     –        –         –    –    –\n\
         !  far     F64/F32 [2]     1.00e0   5.00e-1   [1]  3.0  2.0\n\
         … and 1 more that are not identical\n\
         ! only in A: old\n\
         ! only in B: new\n\
         1 identical, 1 within 1e-6, 2 beyond, 1 only in A, 1 only in B\n"
    );
    assert_eq!(comparison_of_itself(&a), "5 identical, 0 within 0e0, 0 beyond, 0 only in A, 0 only in B\n");
}

fn comparison_of_itself(path: &Path) -> String {
    comparison(path, path).table(0.0, 9).to_string()
}

/// A folder in shards is what it is in one file.
#[test]
fn folders_of_the_hub() {
    let hub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf");
    let sharded = Tensors::open(&hub.join("qwen3_moe")).unwrap();
    assert!(sharded.names().any(|name| name == "model.layers.3.mlp.experts.7.up_proj.weight"));
    assert!(comparison_of_itself(&hub.join("qwen3_moe")).contains(" 0 beyond"));

    // Other sizes of the same family.
    let other = comparison(&hub.join("qwen3_moe"), &hub.join("qwen3_moe_tied"));
    assert!(other.only_a.iter().any(|name| name == "lm_head.weight") && other.only_b.len() > 1);
    assert!(other.tensors.iter().any(|tensor| tensor.a.shape != tensor.b.shape));
}

#[test]
fn what_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| Tensors::open(path).unwrap_err().to_string();
    let path = folder.path().join("x.safetensors");
    assert_eq!(refusal(&path), format!("there is no {}", path.display()));
    assert!(refusal(folder.path()).contains(&folder.path().display().to_string()));
    std::fs::write(&path, [9, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap();
    assert!(refusal(&path).contains("x.safetensors"));

    // A file that is cut after it was opened.
    write(&path, &[doubles("x", &[2], &[1.0, 2.0])]);
    let opened = Tensors::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let error = compare(&opened, &opened).unwrap_err().to_string();
    assert!(error.contains("x.safetensors"), "{error}");
}
