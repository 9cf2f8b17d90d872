//! Steps whose loss or gradient is not finite: no rank changes anything, and all ranks skip or stop alike.

mod common;

use std::fs;
use std::process::{Command, Output};

use common::{DEADLINE, RandomBatches, assert_equal, gather, pieces, setup, tiny_model};
use moe_comm::ThreadWorld;
use moe_kernels::Cpu;
use moe_topology::Mapping;
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup, SkippedSteps};
use serde_json::Value;

/// Random batches with one bad loss weight: in a micro-batch of the last data-parallel rank of two, in one step.
struct Planted {
    source: RandomBatches,
    step: u64,
    weight: f64,
}

impl BatchSource for Planted {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut sequences = self.source.micro_batch(step, u)?;
        if (step, u) == (self.step, 3) {
            sequences[0].weights[5] = self.weight;
        }
        Ok(sequences)
    }
}

fn folded(world_size: usize) -> Setup {
    let (tp, pp, ep) = if world_size == 1 { (1, 1, 1) } else { (2, 2, 4) };
    let mapping = Mapping { world_size, tp, pp, ep, ..Mapping::default() };
    Setup { global_batch_size: 8, ..setup(tiny_model(), mapping) }
}

/// Three steps, the second one bad; checks that it changes nothing on any rank.
fn run(world_size: usize, weight: f64) -> common::Outcome {
    let setup = folded(world_size);
    let (vocab, seq_len) = (setup.model.vocab_size as u32, setup.sequence_length);
    let ranks = ThreadWorld::run(world_size, DEADLINE, move |world| {
        let source = RandomBatches { vocab, seq_len, micro_batch: setup.micro_batch_size };
        let source = Planted { source, step: 2, weight };
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let mut skipped = SkippedSteps::default();
        let first = trainer.step(1, &source)?;
        trainer.await_weights()?;
        let (before, weights) =
            (pieces(&trainer)?, trainer.cx().params.weights(0)?.to_f64(&trainer.cx().device)?);
        let bad = trainer.step(2, &source)?;
        assert!(!bad.updated && !bad.is_finite(), "{bad:?}");
        assert!(pieces(&trainer)? == before, "the state changed");
        assert_eq!(trainer.cx().params.weights(0)?.to_f64(&trainer.cx().device)?, weights);
        let last = trainer.step(3, &source)?;
        assert!([&first, &bad, &last].into_iter().all(|report| skipped.count(report, 1)));
        assert_eq!((skipped, trainer.optimizer().updates()), (SkippedSteps { total: 1, in_a_row: 0 }, 2));
        Ok::<_, moe_train::Error>((vec![first, last], pieces(&trainer)?))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    gather(ranks)
}

#[test]
fn a_bad_loss_weight_skips_the_step_on_every_rank() {
    let reference = run(1, f64::INFINITY);
    for weight in [f64::INFINITY, f64::NAN] {
        assert_equal(&run(8, weight), &reference, &folded(1), &format!("{weight}"));
    }
}

/// A run whose first update ruins the head, and nothing that a router sees.
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

        [parallel]
        world_size = 4
        tp = 2
        pp = 2
        ep = 2

        [train]
        steps = 9
        global_batch_size = 4
        sequence_length = 16
        output = 'run'
        deadline_seconds = 20

        [optimizer]
        lr = 3e38
        lr_schedule = 'constant'
        [[optimizer.groups]]
        match = 'model.*'
        frozen = true

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

fn train(place: &tempfile::TempDir, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
    let Output { status, stderr, .. } =
        command.args(["train", "run.toml"]).args(arguments).current_dir(place.path()).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stderr).unwrap())
}

/// Of each step: its number, whether its gradient has a norm, and the skipped steps so far.
fn metrics(place: &tempfile::TempDir) -> Vec<(u64, bool, u64)> {
    let text = fs::read_to_string(place.path().join("run/metrics.jsonl")).unwrap();
    let steps = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    steps
        .filter(|line| line.get("lr").is_some())
        .map(|line| {
            let number = |key: &str| line[key].as_u64().unwrap();
            (number("step"), !line["grad_norm"].is_null(), number("skipped_steps"))
        })
        .collect()
}

#[test]
fn the_command_stops_with_the_step_its_samples_and_the_state_before_it() {
    let place = place();
    let (status, said) = train(&place, &["--set", "train.non_finite=stop"]);
    assert_eq!(status, 6, "{said}");
    assert!(
        said.contains("error: the loss or the gradient of step 2 is not finite; its samples are ["),
        "{said}"
    );
    assert!(
        said.contains("The state before it is run/checkpoints/step-1: --resume makes the step again"),
        "{said}"
    );
    assert_eq!(metrics(&place), [(1, true, 0), (2, false, 0)]);

    // The step is made again, with the same end; then the policy changes.
    let (status, again) = train(&place, &["--resume", "--set", "train.non_finite=stop"]);
    assert_eq!((status, &again), (6, &said));
    assert_eq!(metrics(&place), [(1, true, 0), (2, false, 0)]);
    let (status, said) = train(&place, &["--resume", "--set", "train.non_finite_limit=2"]);
    assert_eq!(status, 6, "{said}");
    assert!(
        said.contains("the gradient of step 4 is not finite, nor were those of the 2 before it; its"),
        "{said}"
    );
    assert!(
        said.contains("run/checkpoints/step-3: ") && said.contains("a train.non_finite_limit above 2"),
        "{said}"
    );
    assert_eq!(metrics(&place), [(1, true, 0), (2, false, 1), (3, false, 2), (4, false, 2)]);

    // What was skipped before counts.
    let (status, _) = train(&place, &["--resume", "--set", "train.non_finite_limit=3"]);
    assert_eq!(status, 6);
    assert_eq!(metrics(&place)[3..], [(4, false, 3), (5, false, 3)]);
}

/// A coefficient that is infinite in single precision; nothing was trained when it is met.
#[test]
fn the_first_step_can_be_made_again() {
    let place = place();
    for resume in [&[] as &[&str], &["--resume"]] {
        let overrides = ["--set", "train.non_finite=stop", "--set", "model.router_z_loss_coef=1e300"];
        let groups = ["--set", "optimizer.groups=[]"];
        let (status, said) = train(&place, &[resume, &overrides, &groups].concat());
        assert_eq!(status, 6, "{said}");
        assert!(
            said.contains("of step 1 is not finite") && said.contains("run/checkpoints/step-0: "),
            "{said}"
        );
        assert_eq!(metrics(&place), [(1, false, 0)]);
    }
}

/// A first update so large that what the routers of the second step see is no number: neither policy passes over it.
#[test]
fn a_nan_in_a_router_ends_the_run_naming_layer_and_token() {
    let place = place();
    let groups = ["--set", "optimizer.groups=[]"];
    for policy in ["train.non_finite=stop", "train.non_finite_limit=5"] {
        let (status, said) = train(&place, &[&groups[..], &["--set", policy]].concat());
        assert_eq!(status, 6, "{said}");
        assert!(said.contains("layer ") && said.contains("token "), "{said}");
        assert_eq!(metrics(&place), [(1, true, 0)]);
        fs::remove_dir_all(place.path().join("run")).unwrap();
    }
}
