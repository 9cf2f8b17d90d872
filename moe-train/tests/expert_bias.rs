//! Biases that balance the load without a loss: moved by the rule under any mapping, kept by checkpoints, used wherever
//! tokens are routed.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::checkpoints::{meta, rewrite, tensors};
use common::{
    DEADLINE, Outcome, RandomBatches, assert_equal, assert_same_bits, check, gather, pieces, setup,
    tiny_model, train, train_on,
};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::config::ScoringFunc;
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Mapping};
use moe_train::Error;
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::{restore, save};
use moe_train::infer::{Generation, Sampling, generate};
use moe_train::run::open_weights;
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup};

const RATE: f64 = 0.02;

/// Three layers, the second one dense; no loss balances the load.
fn model() -> ModelConfig {
    let model = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        mlp_only_layers: vec![1],
        router_aux_loss_coef: Some(0.0),
        ..tiny_model()
    };
    model.check().unwrap();
    model
}

fn tweak(setup: &mut Setup) {
    (setup.global_batch_size, setup.micro_batch_size) = (8, 2);
    setup.expert_bias_update_rate = RATE;
}

fn case(mapping: Mapping) -> Setup {
    let mut setup = setup(model(), mapping);
    tweak(&mut setup);
    setup
}

fn mapping(tp: usize, dp: usize, pp: usize, etp: usize, ep: usize) -> Mapping {
    Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() }
}

fn name(layer: usize) -> String {
    format!("model.layers.{layer}.block_sparse_moe.gate.e_score_correction_bias")
}

#[test]
fn the_mapping_never_changes_a_bias() {
    let context = Mapping { world_size: 4, cp: 2, ep: 4, ..Mapping::default() };
    let foldings = [
        (mapping(2, 2, 1, 1, 4), AllToAll),
        (mapping(1, 4, 1, 4, 1), AllGather),
        (mapping(3, 1, 3, 1, 1), AllToAll),
        (mapping(2, 2, 3, 2, 2), AllGather),
        (context.split(Attention::CP_INNER, 1), AllToAll),
    ];
    check(&model(), foldings, 4, tweak);

    // Two stages of uneven layers on each of two ranks.
    let mut interleaved = case(mapping(1, 2, 2, 1, 2));
    interleaved.pipeline = PipelineLayout::new(3, 2, &[0, 1, 1, 1]).unwrap();
    let one = case(Mapping::default());
    assert_equal(&train(interleaved, 4), &train(one.clone(), 4), &one, "virtual stages");
}

/// The same sequences in every step.
struct Again(RandomBatches);

impl BatchSource for Again {
    fn micro_batch(&self, _step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        self.0.micro_batch(1, u)
    }
}

/// The rule, from the loads that are reported; and what it is for.
#[test]
fn a_bias_follows_the_load_and_evens_it_out() {
    let (steps, experts) = (12, 8);
    let run = |rate, lr: f64| {
        let mut setup = Setup { expert_bias_update_rate: rate, ..case(Mapping::default()) };
        (setup.lr.max, setup.lr.min) = (lr, lr);
        train_on(setup.clone(), steps, Again(source(&setup)))
    };
    let (moved, frozen) = (run(RATE, 0.0), run(0.0, 0.0));
    for (row, layer) in [0, 2].into_iter().enumerate() {
        let mut bias = vec![0.0; experts];
        for report in &moved.reports {
            for (bias, load) in bias.iter_mut().zip(&report.expert_load[row]) {
                let above = load * experts as f64 - 1.0;
                *bias += if above.abs() < 1e-9 { 0.0 } else { -RATE * above.signum() };
            }
        }
        let values = &moved.state[&name(layer)][0];
        assert!(bias.iter().zip(values).all(|(a, b)| (a - b).abs() < 1e-12), "{bias:?} and {values:?}");
        assert!(bias.iter().any(|&b| b > 0.0) && bias.iter().any(|&b| b < 0.0));
        assert_eq!(frozen.state[&name(layer)][0], [0.0; 8]);
    }
    // The loads of the same tokens by the same weights, but for the biases.
    let largest = |outcome: &Outcome, step: usize| {
        let loads = outcome.reports[step].expert_load.iter().flatten();
        loads.fold(0.0, |max: f64, &load| max.max(load)) * experts as f64
    };
    assert_eq!(largest(&moved, 0), largest(&frozen, 0));
    let (moved, frozen) = (largest(&moved, 11), largest(&frozen, 11));
    assert!(moved < 1.25 && frozen > 1.6, "{moved} and {frozen}");
}

fn source(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

/// One loss weight of step 2 is infinite.
struct Planted(RandomBatches);

impl BatchSource for Planted {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let mut sequences = self.0.micro_batch(step, u)?;
        if (step, u) == (2, 3) {
            sequences[0].weights[5] = f64::INFINITY;
        }
        Ok(sequences)
    }
}

#[test]
fn a_skipped_step_moves_no_bias() {
    let setup = case(mapping(2, 2, 1, 1, 4));
    ThreadWorld::run(4, DEADLINE, move |world| {
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let source = Planted(source(&setup));
        assert!(trainer.step(1, &source)?.updated);
        let before = pieces(&trainer)?;
        assert!(!trainer.step(2, &source)?.updated);
        assert!(pieces(&trainer)? == before, "the state changed");
        assert!(trainer.step(3, &source)?.updated);
        assert!(pieces(&trainer)? != before);
        Ok::<_, Error>(())
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

/// Steps from a checkpoint (or the start) to `last`, which is saved to `root`.
fn leg(setup: &Setup, from: Option<&Path>, last: u64, root: &Path) -> (Outcome, PathBuf) {
    let (inner, from, root) = (setup.clone(), from.map(Path::to_owned), root.to_owned());
    let path = root.join(format!("step-{last}"));
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<f64, Cpu>::new(inner.clone(), &world, Cpu::poisoned(1))?;
        let mut first = 1;
        if let Some(path) = &from {
            let checkpoint = Checkpoint::open(path)?;
            restore(&mut trainer, &checkpoint)?;
            first += checkpoint.step();
        }
        let mut reports = Vec::new();
        for step in first..=last {
            reports.push(trainer.step(step, &source(&inner))?);
        }
        save(&trainer, &root, last, &meta(&inner, last, trainer.optimizer().updates()))?;
        Ok::<_, Error>((reports, pieces(&trainer)?))
    })
    .unwrap_or_else(|error| panic!("{error}"));
    (gather(ranks), path)
}

#[test]
fn checkpoints_hold_the_biases_under_any_folding() {
    let folder = || tempfile::tempdir().unwrap();
    let setups = [Mapping::default(), mapping(2, 2, 1, 1, 4), mapping(1, 2, 3, 2, 1)].map(case);
    let cuts = setups.each_ref().map(|setup| {
        let folder = folder();
        let (_, path) = leg(setup, None, 2, folder.path());
        (folder, path)
    });
    let whole = folder();
    let (mut reference, last) = leg(&setups[0], None, 4, whole.path());
    reference.reports.drain(..2);
    for layer in [0, 2] {
        assert!(tensors(&last).contains_key(&(name(layer), "buffer".to_owned())));
    }
    for (writer, (_, cut)) in cuts.iter().enumerate() {
        for (reader, setup) in setups.iter().enumerate() {
            let again = folder();
            let (resumed, path) = leg(setup, Some(cut), 4, again.path());
            let what = format!("{writer} to {reader}");
            assert_equal(&resumed, &reference, &setups[0], &what);
            if (writer, reader) == (0, 0) {
                assert_same_bits(&resumed, &reference, &what);
                assert!(tensors(&path) == tensors(&last), "{what}");
            }
        }
    }
}

/// The checkpoint at `path` with biases that send every token to the last two experts.
fn skewed(path: &Path, root: &Path) -> PathBuf {
    let bias = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 9.0f64];
    rewrite(path, root, |_, kind, data| {
        Some(if kind == "buffer" { bias.iter().flat_map(|b| b.to_le_bytes()).collect() } else { data })
    })
}

#[test]
fn evaluation_and_samples_use_the_biases_and_leave_them() {
    let folder = || tempfile::tempdir().unwrap();
    let model = ModelConfig { vocab_size: 256, ..model() };
    let setup = Setup { model, ..case(mapping(2, 2, 1, 1, 4)) };
    let (plain, other) = (folder(), folder());
    let (_, plain) = leg(&setup, None, 3, plain.path());
    let other = skewed(&plain, other.path());

    let loss = |path: &Path| {
        let (path, setup) = (path.to_owned(), setup.clone());
        let losses = ThreadWorld::run(4, DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            restore(&mut trainer, &Checkpoint::open(&path)?)?;
            let before = pieces(&trainer)?;
            let loss = trainer.evaluate(4, |u| source(&setup).micro_batch(9, u))?;
            assert!(pieces(&trainer)? == before, "the state changed");
            let stats = trainer.cx().stats.moe.read(&trainer.cx().device)?;
            let seen: Vec<_> = stats.into_values().map(|layer| layer.expert_counts).collect();
            Ok::<_, Error>((loss.unwrap(), seen))
        })
        .unwrap_or_else(|error| panic!("{error}"));
        (losses[0].0, losses.into_iter().flat_map(|(_, seen)| seen).collect::<Vec<_>>())
    };
    let ((balanced, _), (skewed, seen)) = (loss(&plain), loss(&other));
    assert!(seen.iter().all(|counts| counts[..6] == [0; 6] && counts[6] == counts[7] && counts[7] > 0));
    assert!((balanced - skewed).abs() > 1e-6, "{balanced} and {skewed}");

    let generation = Generation { tokens: 24, sampling: Sampling::greedy(), stop: Vec::new() };
    let continued = |path: &Path| {
        let (weights, mut tokens) = (Arc::new(open_weights(path).unwrap()), Vec::new());
        generate(&weights, &[3, 1, 4, 1, 5], &generation, |token| {
            tokens.push(token);
            Ok(())
        })
        .unwrap();
        tokens
    };
    assert_ne!(continued(&plain), continued(&other));
}

#[test]
fn a_checkpoint_without_a_bias_is_refused() {
    let (folder, lacks) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let setup = case(Mapping::default());
    let (_, path) = leg(&setup, None, 1, folder.path());
    let path = rewrite(&path, lacks.path(), |tensor, _, data| (tensor != name(2)).then_some(data));
    let said = ThreadWorld::run(1, DEADLINE, move |world| {
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let before = pieces(&trainer)?;
        let error = restore(&mut trainer, &Checkpoint::open(&path)?).expect_err("it was taken");
        assert!(pieces(&trainer)? == before, "the state changed");
        Ok::<_, Error>(error.to_string())
    })
    .unwrap_or_else(|error| panic!("{error}"));
    assert!(said[0].ends_with(&format!("has no buffer of {}", name(2))), "{}", said[0]);
}
