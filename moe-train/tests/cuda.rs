//! A GPU trains as the host does. Where there is none, the tests say that they were skipped; with `MOE_REQUIRE_GPU` they fail.

mod common;

use common::checkpoints::meta;
use common::{
    Outcome, RandomBatches, assert_equal, assert_same_bits, gather, pieces, setup, tiny_model, train_in,
};
use moe_comm::SoloWorld;
use moe_kernels::{Backend, Cpu, Cuda, Float, bf16, cuda};
use moe_model::ModelConfig;
use moe_topology::Mapping;
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::{restore, save};
use moe_train::optim::Moment;
use moe_train::trainer::{RankTrainer, Setup};

const STEPS: u64 = 4;

fn gpu(test: &str) -> Option<Cuda> {
    match cuda::probe() {
        Ok(count) if count > 0 => Some(Cuda::poisoned(0).expect("a GPU that can be used")),
        absent => {
            let why = absent.map_or_else(|error| error.to_string(), |_| "no CUDA device".into());
            assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "{test}: {why}");
            eprintln!("{test} was skipped: {why}");
            None
        }
    }
}

fn batches(setup: &Setup) -> RandomBatches {
    RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    }
}

fn on_gpu<T: Float>(setup: &Setup, gpu: &Cuda) -> Outcome
where
    Cuda: Backend<T>,
{
    let world = SoloWorld::new(gpu.clone());
    let mut trainer = RankTrainer::<T, Cuda>::new(setup.clone(), &world, gpu.clone()).unwrap();
    let source = batches(setup);
    let reports = (1..=STEPS).map(|step| trainer.step(step, &source).unwrap()).collect();
    gather([(reports, pieces(&trainer).unwrap())])
}

fn models() -> [(&'static str, ModelConfig); 2] {
    let dense_first = ModelConfig {
        first_k_dense_replace: 1,
        use_qk_norm: true,
        n_shared_experts: Some(1),
        moe_intermediate_size: Some(12),
        tie_word_embeddings: true,
        attention_bias: true,
        ..tiny_model()
    };
    [("mixtral", tiny_model()), ("a dense layer, a shared expert, tied embeddings, biases", dense_first)]
}

#[test]
fn in_double_precision_it_gives_what_the_host_gives() {
    let Some(gpu) = gpu("in_double_precision_it_gives_what_the_host_gives") else { return };
    for (what, model) in models() {
        let setup = setup(model, Mapping::default());
        let reference = train_in::<f64>(setup.clone(), STEPS, batches(&setup));
        assert_equal(&on_gpu::<f64>(&setup, &gpu), &reference, &setup, what);
    }
}

#[test]
fn the_same_run_twice_is_the_same_bits() {
    let Some(gpu) = gpu("the_same_run_twice_is_the_same_bits") else { return };
    let setup = setup(tiny_model(), Mapping::default());
    let twice = [on_gpu::<bf16>(&setup, &gpu), on_gpu::<bf16>(&setup, &gpu)];
    assert_same_bits(&twice[0], &twice[1], "bf16");
    let twice = [on_gpu::<f32>(&setup, &gpu), on_gpu::<f32>(&setup, &gpu)];
    assert_same_bits(&twice[0], &twice[1], "f32");
}

/// Loss, gradient norm and first moments against those of double precision, in units of the type's rounding. Choices of experts
/// that are near ties may turn, so the bounds are wide; a wrong factor or a gradient left out is far beyond them.
#[test]
fn in_narrower_types_it_is_as_near_as_they_allow() {
    let Some(gpu) = gpu("in_narrower_types_it_is_as_near_as_they_allow") else { return };
    let setup = setup(tiny_model(), Mapping::default());
    let reference = train_in::<f64>(setup.clone(), STEPS, batches(&setup));
    for (name, outcome, tolerance) in
        [("f32", on_gpu::<f32>(&setup, &gpu), 1e-3), ("bf16", on_gpu::<bf16>(&setup, &gpu), 0.05)]
    {
        for (got, want) in outcome.reports.iter().zip(&reference.reports) {
            let losses = (got.loss.unwrap(), want.loss.unwrap());
            let norms = (got.grad_norm, want.grad_norm);
            for (what, (a, b)) in [("loss", losses), ("gradient norm", norms)] {
                assert!(
                    (a - b).abs() <= tolerance * b.abs(),
                    "{name}: {what} of step {}: {a} and {b}",
                    want.step
                );
            }
        }
        let first = Moment::ALL.iter().position(|&moment| moment == Moment::First).unwrap();
        let (mut error, mut norm) = (0.0, 0.0);
        for (tensor, kept) in &reference.state {
            let pairs = kept[first].iter().zip(&outcome.state[tensor][first]);
            pairs.for_each(|(x, y)| (error, norm) = (error + (x - y).powi(2), norm + x * x));
        }
        let relative = f64::sqrt(error / norm);
        assert!(relative <= 4.0 * tolerance, "{name}: first moments are off by {relative}");
    }
}

/// In bf16 a master weight is nowhere whole: it starts as a run in f32 starts, and goes through a checkpoint bit by bit.
#[test]
fn master_weights_in_bf16_are_kept_to_the_last_bit() {
    let Some(gpu) = gpu("master_weights_in_bf16_are_kept_to_the_last_bit") else { return };
    let setup = setup(tiny_model(), Mapping::default());
    let (source, folder) = (batches(&setup), tempfile::tempdir().unwrap());
    let world = SoloWorld::new(gpu.clone());
    let mut trainer = RankTrainer::<bf16, Cuda>::new(setup.clone(), &world, gpu.clone()).unwrap();
    let state = |trainer: &_| gather([(Vec::new(), pieces::<bf16, Cuda>(trainer).unwrap())]);
    let host = SoloWorld::new(Cpu::new(1));
    let in_f32 = RankTrainer::<f32, Cpu>::new(setup.clone(), &host, Cpu::new(1)).unwrap();
    let in_f32 = gather([(Vec::new(), pieces(&in_f32).unwrap())]);
    assert_same_bits(&state(&trainer), &in_f32, "at the start");

    for step in 1..3 {
        assert!(trainer.step(step, &source).unwrap().updated);
    }
    trainer.await_weights().unwrap();
    let path = save(&trainer, folder.path(), 2, &meta(&setup, 2, trainer.optimizer().updates())).unwrap();
    let mut again = RankTrainer::<bf16, Cuda>::zeros(setup.clone(), &world, gpu.clone()).unwrap();
    restore(&mut again, &Checkpoint::open(&path).unwrap()).unwrap();
    assert_same_bits(&state(&again), &state(&trainer), "from the checkpoint");
    for bucket in 0..trainer.cx().params.buckets().len() {
        let weights = |trainer: &RankTrainer<bf16, Cuda>| {
            trainer.cx().params.weights(bucket).unwrap().to_f64(&gpu).unwrap()
        };
        assert_eq!(weights(&again), weights(&trainer), "the weights of bucket {bucket}");
    }
    let [one, two] = [&mut trainer, &mut again].map(|trainer| trainer.step(3, &source).unwrap());
    assert_eq!(one, two);
    assert_same_bits(&state(&again), &state(&trainer), "after another step");
}
