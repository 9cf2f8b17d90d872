//! A dense model's checkpoint becomes one of a model with experts that computes the same, and trains alike under any folding.

mod common;

use std::path::{Path, PathBuf};

use common::checkpoints::{meta, rewrite};
use common::{DEADLINE, Outcome, RandomBatches, assert_equal, gather, pieces, setup, tiny_model};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::axes::communicators;
use moe_model::config::ScoringFunc;
use moe_model::params::{ParamLayoutBuilder, ParamStore};
use moe_model::{Cx, DecoderStage, Execution, MicroBatch, ModelConfig, Objective, PipelineLayout, RopeTable};
use moe_topology::{Folding, Mapping};
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::upcycle::{Plan, WeightScaling};
use moe_train::checkpoint::{Meta, Weights, restore_weights, save, upcycle};
use moe_train::config::RunConfig;
use moe_train::trainer::RankTrainer;

/// Three layers without experts.
fn dense_model() -> ModelConfig {
    ModelConfig { first_k_dense_replace: 3, mlp_bias: true, ..tiny_model() }
}

/// Six experts of a third of the dense width: two copies of it.
fn granular_model() -> ModelConfig {
    ModelConfig {
        first_k_dense_replace: 0,
        moe_intermediate_size: Some(4),
        num_local_experts: 6,
        num_experts_per_tok: 3,
        expert_mlp_bias: true,
        ..dense_model()
    }
}

/// A checkpoint of `model` after two steps, so that no bias is 0 and no norm 1.
fn trained(model: ModelConfig, root: &Path) -> PathBuf {
    trained_in::<f64>(model, root)
}

fn trained_in<T: Float>(model: ModelConfig, root: &Path) -> PathBuf
where
    Cpu: Backend<T>,
{
    let setup = setup(model, Mapping { world_size: 2, tp: 2, ..Mapping::default() });
    let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
    let root = root.to_owned();
    let paths = ThreadWorld::run(2, DEADLINE, move |world| {
        let mut trainer = RankTrainer::<T, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        for step in 1..=2 {
            trainer.step(step, &source)?;
        }
        save(&trainer, &root, 2, &meta(&setup, 2, 2))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    paths[0].clone()
}

/// The configuration of a run of `model` in f64.
fn config(model: &ModelConfig) -> RunConfig {
    let one = Mapping::default();
    let mut config = meta(&setup(model.clone(), one), 0, 0).run.unwrap().config;
    config.train.dtype = moe_train::config::TrainDType::F64;
    config
}

fn upcycled(dense: &Path, model: &ModelConfig, scaling: WeightScaling, root: &Path) -> PathBuf {
    let dense = Checkpoint::open(dense).unwrap();
    upcycle(&dense, &config(model), scaling, None, root).unwrap_or_else(|error| panic!("{error}")).0
}

/// The logits of a checkpoint's model after each of some tokens.
fn logits(checkpoint: &Path) -> Vec<f64> {
    let path = checkpoint.to_owned();
    let all = ThreadWorld::run(1, DEADLINE, move |world| {
        let checkpoint = Checkpoint::open(&path)?;
        assert!(checkpoint.verify().is_empty());
        let model = Meta::of(&checkpoint)?.model;
        let (device, folding) = (Cpu::poisoned(1), Folding::new(Mapping::default())?);
        let mut layout = ParamLayoutBuilder::new(&folding, 0);
        let whole = PipelineLayout::even(model.num_hidden_layers, 1, 1)?;
        let stage = DecoderStage::of_rank(&mut layout, &model, Execution::default(), &whole)?.remove(0);
        let mut params = ParamStore::<f64, Cpu>::new(layout.build(), 0, &device)?;
        for bucket in 0..params.buckets().len() {
            let layout = &params.buckets()[bucket];
            let mut weights = vec![0.0; layout.len];
            for part in &layout.parts {
                let bytes = checkpoint.read_tensor(&part.name, "param")?;
                let values = bytes.chunks_exact(8).map(|x| f64::from_le_bytes(x.try_into().unwrap()));
                weights[part.range()].iter_mut().zip(values).for_each(|(to, x)| *to = x);
            }
            params.weights_mut(bucket)?.upload(&device, 0, &weights)?;
        }
        let comms = communicators::<Cpu>().build(&world, &device, &folding)?;
        let rope = RopeTable::of(&device, &model, 11)?;
        let objective = Objective { micro_batches: 1, sequences: 1, tokens: 11 };
        let mut cx = Cx::new(device, comms, params, rope, objective);
        let ids: Vec<i32> = (0..11).map(|i| i * i * 5 % 37).collect();
        let positions: Vec<i32> = (0..11).collect();
        cx.batches = vec![MicroBatch::new(&cx.device, 1, &ids, &positions, &ids, &[0.0; 11], 0.0)?];
        Ok::<_, moe_train::Error>(stage.infer(0, None, &mut cx)?.x.to_f64(&cx.device)?)
    })
    .unwrap_or_else(|error| panic!("{error}"));
    all.into_iter().next().unwrap()
}

#[track_caller]
fn assert_close(a: &[f64], b: &[f64]) {
    let largest = b.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let worst = a.iter().zip(b).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    assert!(a.len() == b.len() && worst <= 1e-12 * largest, "{worst:e} of {largest}");
}

/// Whole copies, also beside a layer that stays dense, and whatever the scores.
#[test]
fn copies_are_the_dense_model() {
    let folder = tempfile::tempdir().unwrap();
    let dense = trained(dense_model(), &folder.path().join("dense"));
    let want = logits(&dense);
    let copied = ModelConfig { first_k_dense_replace: 0, expert_mlp_bias: true, ..dense_model() };
    let sigmoid = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        routed_scaling_factor: 2.5,
        moe_router_enable_expert_bias: true,
        ..copied.clone()
    };
    for (n, (model, scaling)) in [
        (copied.clone(), WeightScaling::Published),
        (ModelConfig { mlp_only_layers: vec![1], ..copied }, WeightScaling::Published),
        (sigmoid, WeightScaling::Exact),
    ]
    .into_iter()
    .enumerate()
    {
        let path = upcycled(&dense, &model, scaling, &folder.path().join(n.to_string()));
        assert_close(&logits(&path), &want);
    }
}

/// Slices with the factor where it goes through linearly.
#[test]
fn slices_with_exact_factors_are_the_dense_model() {
    let folder = tempfile::tempdir().unwrap();
    let dense = trained(dense_model(), &folder.path().join("dense"));
    let want = logits(&dense);
    let two_copies = ModelConfig { num_local_experts: 12, num_experts_per_tok: 6, ..granular_model() };
    let sigmoid = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        n_group: 2,
        topk_group: 1,
        routed_scaling_factor: 0.5,
        ..granular_model()
    };
    // A router of zeros, where weights are not normalised.
    let uniform = ModelConfig {
        scoring_func: ScoringFunc::Softmax,
        norm_topk_prob: false,
        initializer_range: 0.0,
        ..two_copies.clone()
    };
    let roots = ["granular", "two", "sigmoid", "uniform"];
    for (root, model) in roots.into_iter().zip([granular_model(), two_copies, sigmoid, uniform]) {
        model.check().unwrap();
        let path = upcycled(&dense, &model, WeightScaling::Exact, &folder.path().join(root));
        assert_close(&logits(&path), &want);
    }
}

/// The published factors: the dense model with a gate and an `up` that are cbrt(g) times as large, and a `down` that makes up
/// for `up` and for what the gate gained where it is linear.
#[test]
fn slices_with_published_factors_are_as_the_paper_says() {
    let folder = tempfile::tempdir().unwrap();
    let dense = trained(dense_model(), &folder.path().join("dense"));
    let path = upcycled(&dense, &granular_model(), WeightScaling::Published, &folder.path().join("moe"));
    let factor = 3f64.cbrt();
    let scaled = rewrite(&dense, &folder.path().join("scaled"), |name, _, bytes| {
        let factor = match name.split_once(".mlp.").map(|(_, name)| name) {
            Some("down_proj.weight") => factor / 3.0,
            Some("down_proj.bias") | None => return Some(bytes),
            Some(_) => factor,
        };
        let values = bytes.chunks_exact(8).map(|x| f64::from_le_bytes(x.try_into().unwrap()) * factor);
        Some(values.flat_map(f64::to_le_bytes).collect())
    });
    assert_close(&logits(&path), &logits(&scaled));
    let (ours, dense) = (logits(&path), logits(&dense));
    assert!(ours.iter().zip(&dense).any(|(a, b)| (a - b).abs() > 1e-6), "a gate is not linear");
}

/// The routers of another checkpoint, unless they would choose parts of copies.
#[test]
fn a_router_can_be_given() {
    let folder = tempfile::tempdir().unwrap();
    let dense = trained(dense_model(), &folder.path().join("dense"));
    let model = granular_model();
    let mut other = config(&model);
    other.train.seed = 77;
    let open = |path: &Path| Checkpoint::open(path).unwrap();
    let make = |config: &RunConfig, router: Option<&Checkpoint>, root: &str| {
        upcycle(&open(&dense), config, WeightScaling::Exact, router, &folder.path().join(root))
    };
    let given = open(&make(&other, None, "given").unwrap().0);
    let plain = open(&make(&config(&model), None, "plain").unwrap().0);
    let with = open(&make(&config(&model), Some(&given), "with").unwrap().0);
    let router = |checkpoint: &Checkpoint| {
        checkpoint.read_tensor("model.layers.1.block_sparse_moe.gate.weight", "param").unwrap()
    };
    assert!(router(&with) == router(&given) && router(&with) != router(&plain));
    assert_close(&logits(with.path()), &logits(&dense));

    let split = rewrite(given.path(), &folder.path().join("split"), |name, _, mut bytes| {
        if name == "model.layers.1.block_sparse_moe.gate.weight" {
            bytes[4 * 24 * 8] ^= 1; // expert 4, the second slice of the second copy
        }
        Some(bytes)
    });
    let error = make(&config(&model), Some(&open(&split)), "refused").unwrap_err().to_string();
    assert!(
        error.starts_with("model.layers.1.block_sparse_moe.gate.weight: the rows of experts 3 and 4 differ"),
        "{error}"
    );
    // No such routers.
    assert!(make(&config(&model), Some(&open(&dense)), "none").is_err());
}

/// In single precision, element by element: slices of the second copy, each product rounded once, router rows alike in
/// threes.
#[test]
fn single_precision_is_rounded_once() {
    let folder = tempfile::tempdir().unwrap();
    let dense = Checkpoint::open(&trained_in::<f32>(dense_model(), &folder.path().join("dense"))).unwrap();
    let mut config = config(&granular_model());
    config.train.dtype = moe_train::config::TrainDType::F32;
    let root = folder.path().join("moe");
    let path = upcycle(&dense, &config, WeightScaling::Exact, None, &root).unwrap().0;
    let moe = Checkpoint::open(&path).unwrap();
    let read = |checkpoint: &Checkpoint, name: &str| -> Vec<f32> {
        let bytes = checkpoint.read_tensor(&format!("model.layers.2.{name}"), "param").unwrap();
        bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    };
    let times = |x: f32, factor: f64| (f64::from(x) * factor) as f32;
    let (hidden, width, wide) = (24, 4, 12);
    // Expert 4: slice 1 of copy 1.
    let (gate, up, down) = (
        read(&dense, "mlp.gate_proj.weight"),
        read(&dense, "mlp.up_proj.weight"),
        read(&dense, "mlp.down_proj.weight"),
    );
    let expert = |name: &str| read(&moe, &format!("block_sparse_moe.experts.4.{name}"));
    let rows = width * hidden..2 * width * hidden;
    assert_eq!(expert("w1.weight"), gate[rows.clone()]);
    assert!(expert("w3.weight").into_iter().eq(up[rows].iter().map(|&x| times(x, 3f64.sqrt()))));
    let columns = (0..hidden).flat_map(|row| (width..2 * width).map(move |col| row * wide + col));
    assert!(expert("w2.weight").into_iter().eq(columns.map(|at| times(down[at], 3f64.sqrt()))));
    assert_eq!(expert("w2.bias"), read(&dense, "mlp.down_proj.bias"));
    assert_eq!(expert("w1.bias"), read(&dense, "mlp.gate_proj.bias")[width..2 * width]);
    let router = read(&moe, "block_sparse_moe.gate.weight");
    let row = |expert: usize| &router[expert * hidden..][..hidden];
    assert!((1..3).all(|expert| row(expert) == row(0)) && (4..6).all(|expert| row(expert) == row(3)));
    assert_ne!(row(0), row(3));
    assert!(
        moe.tensor("model.layers.2.block_sparse_moe.gate.weight", "m").is_err(),
        "no state of an optimizer"
    );
}

/// Steps from a checkpoint's weights.
fn train_from(checkpoint: &Path, model: &ModelConfig, mapping: Mapping, kind: DispatcherKind) -> Outcome {
    let (mut setup, path) = (setup(model.clone(), mapping), checkpoint.to_owned());
    (setup.dispatcher, setup.global_batch_size) = (kind, 8);
    let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        restore_weights(&mut trainer, &Weights::of(Checkpoint::open(&path)?)?)?;
        assert_eq!(trainer.optimizer().updates(), 0);
        let reports = [trainer.step(1, &source)?, trainer.step(2, &source)?];
        Ok::<_, moe_train::Error>((reports.to_vec(), pieces(&trainer)?))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    gather(ranks)
}

#[test]
fn training_from_it_is_the_same_under_any_folding() {
    let folder = tempfile::tempdir().unwrap();
    let dense = trained(dense_model(), &folder.path().join("dense"));
    let model = granular_model();
    let path = upcycled(&dense, &model, WeightScaling::Published, &folder.path().join("moe"));
    let one = train_from(&path, &model, Mapping::default(), DispatcherKind::AllToAll);
    let reference = setup(model.clone(), Mapping::default());
    for (mapping, kind) in [
        (Mapping { world_size: 4, tp: 2, ep: 2, etp: 2, ..Mapping::default() }, DispatcherKind::AllToAll),
        (Mapping { world_size: 6, pp: 3, ep: 2, ..Mapping::default() }, DispatcherKind::AllGather),
    ] {
        let folded = train_from(&path, &model, mapping.clone(), kind);
        assert_equal(&folded, &one, &reference, &mapping.to_string());
    }
}

/// 8 copies in 8 slices, 8 chosen: (8·8²/8)^(1/3) = 4 on each projection, and 8^(1/3) with normalised weights.
#[test]
fn factors_are_those_of_the_paper() {
    let dense = ModelConfig { intermediate_size: 64, mlp_bias: false, ..dense_model() };
    let fine = ModelConfig {
        first_k_dense_replace: 0,
        moe_intermediate_size: Some(8),
        num_local_experts: 64,
        num_experts_per_tok: 8,
        scoring_func: ScoringFunc::Softmax,
        norm_topk_prob: false,
        ..dense.clone()
    };
    let plan = |model: &ModelConfig, scaling| Plan::new(&dense, model, scaling).unwrap();
    let published = plan(&fine, WeightScaling::Published);
    assert_eq!((published.granularity, published.copies, published.scale), (8, 8, 64.0));
    assert_eq!(published.factors, [4.0; 3]);
    assert_eq!(plan(&fine, WeightScaling::Exact).factors, [1.0, 8.0, 8.0]);
    let normalised = ModelConfig { norm_topk_prob: true, ..fine };
    assert_eq!(plan(&normalised, WeightScaling::Published).factors, [2.0; 3]);
    let copies = ModelConfig { moe_intermediate_size: None, num_experts_per_tok: 2, ..normalised };
    assert_eq!(plan(&copies, WeightScaling::Published).factors, [1.0; 3]);
}

#[test]
fn what_cannot_be_upcycled_is_refused_with_the_reason() {
    let refusal = |dense: ModelConfig, change: fn(&mut ModelConfig)| {
        let mut model = granular_model();
        change(&mut model);
        Plan::new(&dense, &model, WeightScaling::Published).unwrap_err().to_string()
    };
    let with = |change| refusal(dense_model(), change);
    assert_eq!(
        refusal(ModelConfig { first_k_dense_replace: 2, ..dense_model() }, |_| ()),
        "layer 2 of the checkpoint's model has experts already: only a dense model can be upcycled"
    );
    assert!(with(|m| m.first_k_dense_replace = 3).contains("no layer with experts"));
    assert_eq!(
        with(|m| m.num_attention_heads = 6),
        "num_attention_heads is 12 in the dense model and 6 in the configured one: they may differ in experts and \
         router only"
    );
    assert!(with(|m| m.tie_word_embeddings = true).starts_with("tie_word_embeddings is false"));
    assert!(
        with(|m| m.moe_intermediate_size = Some(5))
            .contains("= 12 must be a multiple of the width of an expert = 5")
    );
    assert!(
        with(|m| m.num_local_experts = 8).contains("num_local_experts = 8 must be a multiple of the slices")
    );
    assert!(
        with(|m| m.num_experts_per_tok = 2)
            .contains("num_experts_per_tok = 2 must be a multiple of the slices")
    );
    assert!(with(|m| (m.n_group, m.topk_group) = (3, 2)).contains("num_local_experts / n_group = 2"));
    assert!(with(|m| m.n_shared_experts = Some(1)).starts_with("a shared expert cannot be upcycled"));
    assert!(with(|m| m.expert_mlp_bias = false).contains("set expert_mlp_bias = true"));

    let folder = tempfile::tempdir().unwrap();
    let path = trained(dense_model(), folder.path());
    let mut single = config(&granular_model());
    single.train.dtype = moe_train::config::TrainDType::F32;
    let root = folder.path().join("out");
    let dense = Checkpoint::open(&path).unwrap();
    let error = upcycle(&dense, &single, WeightScaling::Published, None, &root).unwrap_err().to_string();
    assert!(error.contains("f64 there and") && error.contains("f32 in this run"), "{error}");
    assert!(!root.join("step-0").exists() && std::fs::read_dir(&root).unwrap().next().is_none());
}
