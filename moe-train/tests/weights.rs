//! Weights without a run: read in another type than they were written in, under another folding, and refused where a run
//! is needed.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::checkpoints::{meta, tensors};
use common::{DEADLINE, gather, pieces, setup, tiny_model};
use moe_comm::ThreadWorld;
use moe_kernels::{Backend, Cpu, DType, Float};
use moe_model::ModelConfig;
use moe_topology::Mapping;
use moe_train::Error;
use moe_train::checkpoint::container::{
    Checkpoint, CheckpointError, PendingCheckpoint, PieceSpec, PieceWriter,
};
use moe_train::checkpoint::{Meta, Weights, restore, restore_weights, save};
use moe_train::infer::{Generation, Sampling, generate};
use moe_train::trainer::{RankTrainer, Setup};

fn folded(mapping: Mapping) -> Setup {
    let model = ModelConfig {
        vocab_size: 257,
        mlp_only_layers: vec![1],
        shared_expert_intermediate_size: Some(6),
        scoring_func: moe_model::config::ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        ..tiny_model()
    };
    setup(model, mapping)
}

fn writer() -> Setup {
    folded(Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() })
}

/// Foldings that read: one rank, and experts cut over ranks whose slices start within rows.
fn readers() -> [Setup; 3] {
    [
        Mapping::default(),
        Mapping { world_size: 4, etp: 2, ep: 2, ..Mapping::default() },
        Mapping { world_size: 6, tp: 3, pp: 2, ep: 1, ..Mapping::default() },
    ]
    .map(folded)
}

/// A checkpoint of starting weights.
fn written<T: Float>(root: &Path) -> PathBuf
where
    Cpu: Backend<T>,
{
    let (setup, owned) = (writer(), root.to_owned());
    let paths = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let trainer = RankTrainer::<T, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        save(&trainer, &owned, 3, &meta(&setup, 3, 3))
    });
    paths.unwrap().remove(0)
}

/// The master weights and buffers that a trainer in `T` has of `path`, by name.
fn read<T: Float>(setup: Setup, path: &Path) -> Vec<(String, Vec<f64>)>
where
    Cpu: Backend<T>,
{
    let weights = Arc::new(Weights::of(Checkpoint::open(path).unwrap()).unwrap());
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        // From another seed, so that nothing is right by itself.
        let setup = Setup { seed: 77, ..setup.clone() };
        let mut trainer = RankTrainer::<T, Cpu>::new(setup, &world, Cpu::poisoned(1))?;
        restore_weights(&mut trainer, &weights)?;
        Ok::<_, Error>((Vec::new(), pieces(&trainer)?))
    });
    let state = gather(ranks.unwrap()).state;
    assert!(state.values().all(|[_, m, v]| m.iter().chain(v).all(|&x| x == 0.0)));
    state.into_iter().map(|(name, [master, ..])| (name, master)).collect()
}

/// Copies what is kept as `kinds` of a checkpoint to `root`, of a run or of none, buffers set to thirds.
fn copied(path: &Path, root: &Path, kinds: &[&str], meta: &Meta) -> PathBuf {
    let checkpoint = Checkpoint::open(path).unwrap();
    let pending = PendingCheckpoint::create(root, checkpoint.step()).unwrap();
    let mut writer = PieceWriter::create(pending.folder(), 0).unwrap();
    for tensor in checkpoint.tensors().filter(|tensor| kinds.contains(&tensor.kind)) {
        let (dims, dtype, kind) = (tensor.dims, tensor.dtype, tensor.kind.to_owned());
        let (rows, cols, part) = (0..dims[0], 0..dims[1], 0..dims[0] * dims[1]);
        let mut data = checkpoint.read_tensor(tensor.name, tensor.kind).unwrap();
        if kind == "buffer" {
            data = match dtype {
                DType::F64 => part.clone().flat_map(|n| (n as f64 / 3.0).to_le_bytes()).collect(),
                _ => part.clone().flat_map(|n| (n as f32 / 3.0).to_le_bytes()).collect(),
            };
        }
        let spec = PieceSpec { tensor: tensor.name.to_owned(), kind, dtype, dims, rows, cols, part };
        writer.write(spec, &data).unwrap();
    }
    pending.commit(vec![writer.finish().unwrap()], serde_json::to_value(meta).unwrap()).unwrap()
}

fn without_run() -> Meta {
    Meta { model: writer().model, hub: None, run: None }
}

fn values(path: &Path, narrow: bool) -> Vec<(String, Vec<f64>)> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let of = |((name, kind), bytes): ((String, String), Vec<u8>)| {
        let values: Vec<f64> = match checkpoint.tensor(&name, &kind).unwrap().dtype {
            DType::F64 => bytes.chunks(8).map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect(),
            _ => bytes.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()).into()).collect(),
        };
        (name, values.into_iter().map(|x| if narrow { f64::from(x as f32) } else { x }).collect())
    };
    tensors(path).into_iter().map(of).collect()
}

#[test]
fn weights_are_widened_exactly_and_narrowed_to_the_nearest_under_any_folding() {
    let folder = tempfile::tempdir().unwrap();
    let [singles, doubles] = [folder.path().join("f32"), folder.path().join("f64")];
    let weights = ["param", "buffer"];
    let single = copied(&written::<f32>(&singles), &folder.path().join("a"), &weights, &without_run());
    let double = copied(&written::<f64>(&doubles), &folder.path().join("b"), &weights, &without_run());
    for setup in readers() {
        let what = format!("{}", setup.folding.mapping());
        assert!(read::<f64>(setup.clone(), &single) == values(&single, false), "f32 in f64, {what}");
        assert!(read::<f32>(setup.clone(), &double) == values(&double, true), "f64 in f32, {what}");
        assert!(read::<f32>(setup, &single) == values(&single, false), "f32 in f32, {what}");
    }
}

#[test]
fn what_needs_a_run_refuses_weights_alone() {
    let folder = tempfile::tempdir().unwrap();
    let run = written::<f64>(&folder.path().join("run"));
    let path = copied(&run, &folder.path().join("weights"), &["param", "buffer"], &without_run());
    let refused = |path: PathBuf| {
        let setup = folded(Mapping::default());
        let errors = ThreadWorld::run(1, DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            Ok::<_, Error>(restore(&mut trainer, &Checkpoint::open(&path)?).expect_err("it was taken"))
        });
        errors.unwrap().remove(0)
    };
    let error = refused(path.clone());
    assert!(matches!(error, Error::Checkpoint(CheckpointError::NoRun { .. })), "{error}");
    assert!(error.to_string().contains("is of no training run"), "{error}");

    let weights = Arc::new(Weights::of(Checkpoint::open(&path).unwrap()).unwrap());
    let generation = Generation { tokens: 1, sampling: Sampling::greedy(), stop: Vec::new() };
    let error = generate(&weights, &[1], &generation, |_| Ok(())).unwrap_err();
    assert!(error.to_string().contains("is of no training run"), "{error}");

    // Of a run, but without moments: what upcycling makes.
    let meta = Meta::of(&Checkpoint::open(&run).unwrap()).unwrap();
    let path = copied(&run, &folder.path().join("none"), &["param", "buffer"], &meta);
    let error = refused(path).to_string();
    assert!(error.contains("has no m of "), "{error}");
}

#[test]
fn another_model_shape_or_type_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = written::<f64>(folder.path());
    let weights = Weights::of(Checkpoint::open(&path).unwrap()).unwrap();
    let refusal = |error: moe_train::Error| error.to_string();
    let name = "model.embed_tokens.weight";
    let block = weights.read::<f64>(name, [257, 24], 3..5, 2..9).unwrap();
    assert_eq!(block.len(), 14);
    let error = refusal(weights.read::<f64>(name, [256, 24], 0..1, 0..1).unwrap_err());
    assert!(error.contains("model.embed_tokens.weight is [257, 24] f64 there and [256, 24] f64"), "{error}");
    let error = refusal(weights.read::<f64>(name, [257, 24], 0..258, 0..1).unwrap_err());
    assert!(error.contains("has no block of rows 0..258"), "{error}");
    let error = refusal(weights.read::<f64>("lm_head.bias", [1, 1], 0..1, 0..1).unwrap_err());
    assert!(error.contains("has no param of lm_head.bias"), "{error}");

    // Meta data of something else.
    let other = serde_json::json!({ "model": weights.model(), "rnu": null });
    let pending = PendingCheckpoint::create(&folder.path().join("other"), 0).unwrap();
    let path = pending.commit(Vec::new(), other).unwrap();
    let error = refusal(Weights::of(Checkpoint::open(&path).unwrap()).unwrap_err());
    assert!(error.contains("manifest.json is not that of a model: unknown field `rnu`"), "{error}");
}
