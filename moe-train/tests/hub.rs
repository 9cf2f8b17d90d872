//! Folders of the hub into checkpoints and runs under any folding, and back: the same bytes.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::checkpoints::meta;
use common::{DEADLINE, RandomBatches, gather, pieces, setup};
use moe_comm::{SoloWorld, ThreadWorld};
use moe_kernels::{Backend, Cpu, DType, Float};
use moe_model::hf::FloatType;
use moe_topology::Mapping;
use moe_train::Error;
use moe_train::checkpoint::container::{Checkpoint, step_folder};
use moe_train::checkpoint::{ExportOptions, Meta, Weights, export, import, open_hub, restore_weights, save};
use moe_train::config::TrainDType;
use moe_train::run::open_weights;
use moe_train::trainer::{RankTrainer, Setup};
use safetensors::SafeTensors;
use serde_json::Value;

/// The folders, made by `fixtures/hf/make.py`.
fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf");
    let folders = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = folders.filter(|path| path.join("config.json").is_file()).collect();
    folders.sort();
    assert!(folders.len() >= 10);
    folders
}

fn fixture(name: &str) -> PathBuf {
    fixtures().into_iter().find(|path| path.ends_with(name)).unwrap()
}

/// Opened without a warning.
fn open(path: &Path) -> Weights {
    open_hub(path, &mut |warning| panic!("{warning}")).unwrap()
}

type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

/// All tensors of a folder, as the format's own library reads them.
fn tensors(folder: &Path) -> Tensors {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let tensor = (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
                assert!(tensors.insert(name.to_owned(), tensor).is_none(), "{name} twice");
            }
        }
    }
    tensors
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[track_caller]
fn assert_same_folder(a: &Path, b: &Path) {
    let (ours, theirs) = (tensors(a), tensors(b));
    assert!(ours.keys().eq(theirs.keys()), "{}: other names", b.display());
    for (name, tensor) in ours {
        assert!(tensor == theirs[&name], "{}: {name}", b.display());
    }
    assert_eq!(config(a), config(b), "{}", b.display());
}

/// Foldings that the model allows, of those that cut it in every way.
fn foldings(weights: &Weights) -> Vec<Mapping> {
    let mapping = |world_size, tp, pp, ep, etp| Mapping { world_size, tp, pp, ep, etp, ..Mapping::default() };
    let candidates = [
        mapping(2, 2, 1, 1, 2),
        mapping(3, 3, 1, 1, 3),
        mapping(4, 2, 2, 2, 1),
        mapping(4, 1, 1, 4, 1),
        mapping(4, 1, 1, 2, 2),
        mapping(6, 1, 3, 2, 1),
        mapping(6, 3, 2, 1, 1),
        mapping(8, 2, 4, 2, 1),
        mapping(2, 1, 1, 2, 1),
        mapping(3, 1, 1, 1, 3),
    ];
    let constraints = weights.model().constraints();
    let legal = |mapping: &Mapping| constraints.fold(mapping.clone()).is_ok();
    let legal: Vec<Mapping> = candidates.into_iter().filter(legal).take(3).collect();
    assert_eq!(legal.len(), 3, "{}", weights.path().display());
    legal
}

/// Takes `weights` over under a folding and saves what the ranks have.
fn through_a_run<T: Float>(setup: Setup, weights: &Arc<Weights>, root: &Path) -> PathBuf
where
    Cpu: Backend<T>,
{
    let (weights, root) = (weights.clone(), root.to_owned());
    let paths = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<T, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        restore_weights(&mut trainer, &weights)?;
        let meta = Meta { hub: weights.meta().hub.clone(), ..meta(&setup, 7, 0) };
        save(&trainer, &root, 7, &meta)
    });
    paths.unwrap_or_else(|error| panic!("{error}")).remove(0)
}

#[test]
fn what_comes_in_goes_out_the_same_under_any_folding() {
    for fixture in fixtures() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let direct = Arc::new(open(&fixture));
        export(&direct, &at("direct"), ExportOptions::default()).unwrap();
        assert_same_folder(&fixture, &at("direct"));

        for (dtype, name) in [(DType::F32, "single"), (DType::F64, "double")] {
            let path = match dtype {
                DType::F64 => import::<f64>(&direct, &at(name)),
                _ => import::<f32>(&direct, &at(name)),
            }
            .unwrap();
            assert_eq!(path, step_folder(&at(name), 0));
            let imported = open_weights(&path).unwrap();
            assert_eq!(imported.dtype(), dtype);
            assert_eq!(imported.meta(), direct.meta());
            assert!(imported.run().unwrap_err().to_string().contains("is of no training run"));
            let sharded = ExportOptions { max_shard_size: 9_000, ..ExportOptions::default() };
            export(&imported, &at(&format!("{name}-out")), sharded).unwrap();
            assert_same_folder(&fixture, &at(&format!("{name}-out")));
        }
        let imported = Arc::new(open_weights(&step_folder(&at("single"), 0)).unwrap());
        // What an import made is found by the folder that it was given, too.
        assert_eq!(open_weights(&at("single")).unwrap().path(), imported.path());
        for (n, mapping) in foldings(&direct).into_iter().enumerate() {
            let setup = setup(direct.model().clone(), mapping);
            // From the folder and from the checkpoint, in both types.
            let run = match n {
                1 => through_a_run::<f64>(setup, &direct, &at(&format!("run-{n}"))),
                2 => through_a_run::<f32>(setup, &direct, &at(&format!("run-{n}"))),
                _ => through_a_run::<f32>(setup, &imported, &at(&format!("run-{n}"))),
            };
            export(&open_weights(&run).unwrap(), &at(&format!("out-{n}")), ExportOptions::default()).unwrap();
            assert_same_folder(&fixture, &at(&format!("out-{n}")));
        }
    }
}

#[test]
fn what_was_trained_is_exported_in_the_type_that_is_asked_for() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let weights = Arc::new(open(&fixture("deepseek_v3")));
    let mapping = foldings(&weights).remove(1);
    let setup = setup(weights.model().clone(), mapping);
    let source = RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    };
    let (inner, root, from) = (setup.clone(), at("run"), weights.clone());
    let state = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let setup = Setup { expert_bias_update_rate: 0.25, ..inner.clone() };
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup, &world, Cpu::poisoned(1))?;
        restore_weights(&mut trainer, &from)?;
        trainer.step(1, &source)?;
        save(&trainer, &root, 1, &Meta { hub: from.meta().hub.clone(), ..meta(&inner, 1, 1) })?;
        Ok::<_, Error>((Vec::new(), pieces(&trainer)?))
    });
    let state = gather(state.unwrap()).state;

    let trained = open_weights(&step_folder(&at("run"), 1)).unwrap();
    let export_as = |dtype, name: &str| {
        export(&trained, &at(name), ExportOptions { dtype, ..ExportOptions::default() }).unwrap();
        (tensors(&at(name)), open(&at(name)), config(&at(name)))
    };
    let (single, opened, said) = export_as(None, "single");
    let (double, exact, double_said) = export_as(Some(FloatType::F64), "double");
    let (half, _, half_said) = export_as(Some(FloatType::Bf16), "half");
    assert_eq!((exact.dtype(), opened.dtype()), (DType::F64, DType::F32));
    assert_eq!(said, config(&fixture("deepseek_v3")));
    assert_eq!((&double_said["dtype"], &half_said["dtype"]), (&"float64".into(), &"bfloat16".into()));
    let original = tensors(&fixture("deepseek_v3"));
    let mut moved = 0;
    for (name, [master, ..]) in &state {
        let dims = match name.ends_with("e_score_correction_bias") {
            true => {
                assert_eq!(exact.read_buffer::<f64>(name, master.len()).unwrap(), *master);
                continue;
            }
            false => trained_dims(&exact, name),
        };
        let read = |weights: &Weights| weights.read::<f64>(name, dims, 0..dims[0], 0..dims[1]).unwrap();
        assert_eq!(read(&exact), *master, "{name}");
        assert!(read(&opened).iter().zip(master).all(|(&x, &y)| x == f64::from(y as f32)), "{name}");
        moved += 1;
    }
    assert_eq!(moved + 2, original.len());
    let bias = "model.layers.1.mlp.gate.e_score_correction_bias";
    for (name, (dtype, shape, bytes)) in &half {
        let kept = name.ends_with("e_score_correction_bias");
        assert_eq!(*dtype, if kept { safetensors::Dtype::F32 } else { safetensors::Dtype::BF16 }, "{name}");
        assert_eq!(*shape, original[name].1);
        assert_eq!(bytes.len() * if kept { 2 } else { 4 }, double[name].2.len());
    }
    assert!(single[bias] != original[bias], "it was trained");
}

/// Masters in the middle of two bf16: a run in bf16 trained with the one farther from zero.
#[test]
fn a_run_in_bf16_is_exported_as_it_trained() {
    const NORM: &str = "model.norm.weight";
    let ties = [0x3f80_8000u32, 0x3f81_8000, 0xbf80_8000];
    let weights = open(&fixture("mixtral"));
    let setup = setup(weights.model().clone(), Mapping::default());
    let trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &SoloWorld::new(Cpu::new(1)), Cpu::new(1));
    let trainer = trainer.unwrap();
    for (dtype, in_bf16) in
        [(TrainDType::F32, [0x3f80u16, 0x3f82, 0xbf80]), (TrainDType::Bf16, [0x3f81, 0x3f82, 0xbf81])]
    {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let mut meta = meta(&setup, 7, 0);
        meta.run.as_mut().unwrap().config.train.dtype = dtype;
        let saved = save(&trainer, &at("run"), 7, &meta).unwrap();
        let changed = common::checkpoints::rewrite(&saved, &at("ties"), |name, kind, mut data| {
            if (name, kind) == (NORM, "param") {
                data[..12].copy_from_slice(&ties.map(u32::to_le_bytes).concat());
            }
            Some(data)
        });
        let exported = |asked, name: &str| {
            let options = ExportOptions { dtype: asked, ..ExportOptions::default() };
            export(&open_weights(&changed).unwrap(), &at(name), options).unwrap();
            tensors(&at(name)).remove(NORM).unwrap()
        };
        let (written, _, bytes) = exported(Some(FloatType::Bf16), "half");
        assert_eq!(written, safetensors::Dtype::BF16);
        assert_eq!(bytes[..6], in_bf16.map(u16::to_le_bytes).concat(), "{dtype}");
        // Masters as they are, unless asked.
        let (written, _, bytes) = exported(None, "single");
        assert_eq!(written, safetensors::Dtype::F32);
        assert_eq!(bytes[..12], ties.map(u32::to_le_bytes).concat(), "{dtype}");
    }
}

fn trained_dims(weights: &Weights, name: &str) -> [usize; 2] {
    let layout = moe_model::params::ParamLayout::of_model(weights.model()).unwrap();
    let mut parts = layout.buckets().iter().flat_map(|bucket| &bucket.parts);
    parts.find(|part| part.name == name).unwrap().dims
}

#[test]
fn what_belongs_to_a_model_goes_along() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("hub")).unwrap();
    for entry in fs::read_dir(fixture("mixtral")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, at("hub").join(path.file_name().unwrap())).unwrap();
    }
    for name in ["tokenizer.json", "generation_config.json", "merges.txt", "secrets.txt"] {
        fs::write(at("hub").join(name), name).unwrap();
    }
    let weights = open(&at("hub"));
    assert_eq!(weights.side_files(), Some(at("hub")));
    let imported = open_weights(&import::<f32>(&weights, &at("import")).unwrap()).unwrap();
    assert_eq!(imported.side_files(), Some(at("import/hub")));
    export(&imported, &at("out"), ExportOptions::default()).unwrap();
    for folder in ["import/hub", "out"] {
        for name in ["tokenizer.json", "generation_config.json", "merges.txt"] {
            assert_eq!(fs::read_to_string(at(folder).join(name)).unwrap(), name);
        }
        assert!(!at(folder).join("secrets.txt").exists());
    }
    assert!(!at("import/hub/config.json").exists());
    assert_eq!(open_weights(&at("import/step-0")).unwrap().side_files(), Some(at("import/hub")));
    assert!(Checkpoint::open(&at("import/step-0")).unwrap().verify().is_empty());
}

#[test]
fn what_fails_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let entries = || {
        let names = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    // A weight that is no number.
    let bad = at("bad");
    fs::create_dir(&bad).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("deepseek_v3").join(name), bad.join(name)).unwrap();
    }
    let mut bytes = fs::read(bad.join("model.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(bad.join("model.safetensors"), bytes).unwrap();
    let weights = open(&bad);
    let refusal = import::<f32>(&weights, &at("root")).unwrap_err().to_string();
    assert!(refusal.contains("has NaN at [") && refusal.contains("must be finite"), "{refusal}");
    assert_eq!(fs::read_dir(at("root")).unwrap().count(), 0);
    let refusal = export(&weights, &at("out"), ExportOptions::default()).unwrap_err().to_string();
    assert!(refusal.contains("has NaN at ["), "{refusal}");
    assert_eq!(entries(), ["bad", "root"]);

    // There already.
    let weights = open(&fixture("deepseek_v3"));
    import::<f32>(&weights, &at("root")).unwrap();
    let refusal = import::<f32>(&weights, &at("root")).unwrap_err().to_string();
    assert!(refusal.contains("step-0 exists already"), "{refusal}");
    fs::create_dir(at("out")).unwrap();
    let refusal = export(&weights, &at("out"), ExportOptions::default()).unwrap_err().to_string();
    assert!(refusal.contains("out exists already and is not overwritten"), "{refusal}");
    assert_eq!(entries(), ["bad", "out", "root"]);
    assert_eq!(fs::read_dir(at("out")).unwrap().count(), 0);

    // Too small a type.
    let weights = open(&fixture("mixtral"));
    let import = import::<f64>(&weights, &at("wide")).unwrap();
    let large = common::checkpoints::rewrite(&import, &at("large"), |name, _, mut data| {
        if name == "model.norm.weight" {
            data[8..16].copy_from_slice(&1e39f64.to_le_bytes());
        }
        Some(data)
    });
    let weights = open_weights(&large).unwrap();
    let options = ExportOptions { dtype: Some(FloatType::F16), ..ExportOptions::default() };
    let refusal = export(&weights, &at("narrow"), options).unwrap_err().to_string();
    assert!(
        refusal.contains("model.norm.weight has 1e39 at [0, 1], which is infinite in float16"),
        "{refusal}"
    );
    assert!(!at("narrow").exists());
}
