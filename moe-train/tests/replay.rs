//! Routing that is recorded under one mapping and replayed under another, by other weights, in another type.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{DEADLINE, Outcome, RandomBatches, assert_equal, setup, tiny_model, train};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::ModelConfig;
use moe_model::config::{AuxLoss, AuxLossScope};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{RankTrainer, Setup, StepReport};
use serde_json::Value;
use tempfile::TempDir;

const STEPS: u64 = 2;

/// The middle layer is dense; choices are counted beforehand where a rank has several micro-batches.
fn case(mapping: Mapping) -> Setup {
    let model = ModelConfig {
        mlp_only_layers: vec![1],
        router_jitter_noise: 0.1,
        router_aux_loss_coef: None,
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Global, coef: 0.05 }],
        ..tiny_model()
    };
    Setup { global_batch_size: 8, micro_batch_size: 2, ..setup(model, mapping) }
}

/// One rank; sequences over TP, CP and both; stages.
fn mappings() -> [Mapping; 5] {
    let mapping = |tp, cp, dp, pp, etp, ep| Mapping {
        world_size: tp * cp * dp * pp,
        tp,
        cp,
        pp,
        etp,
        ep,
        ..Mapping::default()
    };
    [
        mapping(1, 1, 1, 1, 1, 1),
        mapping(2, 1, 2, 1, 1, 4),
        mapping(3, 2, 1, 1, 3, 2).split(Attention::CP_INNER, 2),
        mapping(1, 2, 2, 1, 1, 2),
        mapping(2, 1, 2, 3, 2, 2),
    ]
}

fn loads(reports: &[StepReport]) -> Vec<Vec<Vec<f64>>> {
    reports.iter().map(|report| report.expert_load.clone()).collect()
}

fn record(mapping: Mapping, root: &Path) -> Outcome {
    train(Setup { record_routing: Some(root.to_owned()), ..case(mapping) }, STEPS)
}

#[test]
fn what_is_recorded_and_replayed_knows_no_mapping() {
    let folders: Vec<_> = mappings().iter().map(|_| tempfile::tempdir().unwrap()).collect();
    let recorded: Vec<_> = mappings()
        .into_iter()
        .zip(&folders)
        .map(|(mapping, folder)| record(mapping, folder.path()))
        .collect();
    for step in 1..=STEPS {
        let read = |folder: &TempDir| {
            let [choices, margins] =
                ["choices", "margins"].map(|of| common::recorded(folder.path(), step, of));
            assert_eq!(
                (choices.len(), margins.len()),
                (2, 2),
                "a matrix of each for each layer with experts"
            );
            let margins: Vec<f64> = margins
                .into_values()
                .flatten()
                .collect::<Vec<u8>>()
                .chunks_exact(8)
                .map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()))
                .collect();
            (choices, margins)
        };
        let (choices, margins) = read(&folders[0]);
        assert_eq!(margins.len(), 2 * 8 * 12);
        for (folder, mapping) in folders.iter().zip(mappings()) {
            let (other, others) = read(folder);
            assert!(other == choices, "{mapping}");
            assert_eq!(others.len(), margins.len());
            let differ = |(a, b): (&f64, &f64)| (a - b).abs() > 1e-10;
            assert!(!others.iter().zip(&margins).any(differ), "{mapping}: margins");
        }
    }
    // Noting changes nothing.
    let quiet = train(case(Mapping::default()), STEPS);
    assert_equal(&recorded[0], &quiet, &case(Mapping::default()), "recorded");

    // Other weights make other choices, unless they are given these.
    let other = |mapping, root: Option<&Path>| {
        let replay_routing = root.map(Path::to_owned);
        train(Setup { seed: 6, replay_routing, ..case(mapping) }, STEPS)
    };
    let own = other(Mapping::default(), None);
    assert_ne!(loads(&own.reports), loads(&quiet.reports));
    let root = folders[4].path();
    let reference = other(Mapping::default(), Some(root));
    assert_eq!(loads(&reference.reports), loads(&quiet.reports));
    assert_ne!(reference.reports[0].loss, own.reports[0].loss);
    for (mapping, dispatcher) in
        mappings().into_iter().zip([AllToAll, AllGather, AllToAll, AllGather, AllToAll])
    {
        let what = format!("{mapping}");
        let replay_routing = Some(root.to_owned());
        let replayed = train(Setup { seed: 6, replay_routing, dispatcher, ..case(mapping) }, STEPS);
        assert_equal(&replayed, &reference, &case(Mapping::default()), &what);
    }
    // By the weights that made them, they are what would have been chosen.
    let same = train(Setup { replay_routing: Some(root.to_owned()), ..case(Mapping::default()) }, STEPS);
    assert_equal(&same, &quiet, &case(Mapping::default()), "replayed by the same weights");
}

/// Choices of double precision in single precision: what would flip at a near tie stays.
#[test]
fn another_type_makes_the_same_choices() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = record(mappings()[1].clone(), folder.path());
    for mapping in [Mapping::default(), mappings()[2].clone()] {
        let setup = Setup { replay_routing: Some(folder.path().to_owned()), ..case(mapping) };
        let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 12, micro_batch: 2 };
            let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            (1..=STEPS).map(|step| trainer.step(step, &source)).collect::<moe_train::Result<Vec<_>>>()
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(loads(&ranks[0]), loads(&wanted.reports));
        for (single, double) in ranks[0].iter().zip(&wanted.reports) {
            let (a, b) = (single.loss.unwrap(), double.loss.unwrap());
            assert!((a - b).abs() < 1e-5 * b, "{a} and {b}");
        }
    }
}

fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = "
        [model]
        vocab_size = 256
        hidden_size = 16
        intermediate_size = 8
        num_hidden_layers = 2
        num_attention_heads = 4
        num_key_value_heads = 2
        num_local_experts = 4
        num_experts_per_tok = 2
        [train]
        steps = 3
        save_interval = 1
        global_batch_size = 4
        sequence_length = 16
        output = 'first'
        deadline_seconds = 20
        [data]
        files = ['*.txt']
    ";
    fs::write(folder.path().join("run.toml"), config).unwrap();
    for n in 0..3 {
        fs::write(folder.path().join(format!("{n}.txt")), "to be or not to be, and so on; ".repeat(9 + n))
            .unwrap();
    }
    folder
}

fn command(place: &tempfile::TempDir, overrides: &[&str], more: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
    command.args(["train", "run.toml"]).args(more).current_dir(place.path());
    for text in overrides {
        command.args(["--set", text]);
    }
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8(stderr).unwrap())
}

fn load_lines(place: &tempfile::TempDir, run: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path().join(run).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get("lr").is_some()).map(|line| line["expert_load"].clone()).collect()
}

#[test]
fn the_command_records_and_replays() {
    let place = place();
    let folded = ["parallel.world_size=4", "parallel.tp=2", "parallel.pp=2", "parallel.ep=2"];
    let recording = [&folded[..], &["train.record_routing=true"]].concat();
    assert_eq!(command(&place, &recording, &[]).0, 0);
    // The last step is made, and recorded, again.
    fs::remove_dir_all(place.path().join("first/checkpoints/step-3")).unwrap();
    let again = command(&place, &recording, &["--resume"]);
    assert_eq!(again.0, 0, "{}", again.1);

    let replay = |run: &str, more: &[&str]| {
        let output = format!("train.output={run}");
        let common = ["train.replay_routing=first/routing", "model.initializer_range=0.05", &output];
        command(&place, &[&common, more].concat(), &[])
    };
    let (status, said) = replay("second", &[]);
    assert_eq!(status, 0, "{said}");
    assert_eq!(load_lines(&place, "second"), load_lines(&place, "first"));

    let (status, said) = replay("third", &["train.global_batch_size=8"]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("cannot be replayed: sequences was 4 when it was recorded and is 8 now"), "{said}");
    let (status, said) = replay("fourth", &["train.steps=4"]);
    assert_eq!(status, 4, "{said}");
    assert!(said.contains("first/routing/step-4"), "{said}");
    assert!(!place.path().join("fourth").exists(), "nothing ran");
}
