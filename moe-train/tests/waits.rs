//! The host waits for a device at the end of a step alone, as often for many layers and micro-batches as for one.

mod common;

use common::{RandomBatches, setup, tiny_model};
use moe_comm::SoloWorld;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::ModelConfig;
use moe_topology::Mapping;
use moe_train::trainer::RankTrainer;

/// How often the second step of a model of so many layers and micro-batches waits.
fn waits_of_a_step<T: Float, D: Backend<T>>(
    device: &D,
    layers: usize,
    micro_batches: usize,
    waits: impl Fn(&D) -> u64,
) -> u64 {
    let mut setup = setup(ModelConfig { num_hidden_layers: layers, ..tiny_model() }, Mapping::default());
    setup.global_batch_size = micro_batches * setup.micro_batch_size;
    let source = RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    };
    let world = SoloWorld::new(device.clone());
    let mut trainer = RankTrainer::<T, D>::new(setup, &world, device.clone()).unwrap();
    trainer.step(1, &source).unwrap();
    let before = waits(device);
    let report = trainer.step(2, &source).unwrap();
    assert!(report.updated && report.loss.is_some());
    waits(device) - before
}

/// Two for the loss, one for what routers saw, one for the norm of the gradient.
fn check<T: Float, D: Backend<T>>(device: &D, waits: impl Fn(&D) -> u64) {
    for (layers, micro_batches) in [(1, 1), (3, 1), (1, 4), (3, 4)] {
        let got = waits_of_a_step::<T, D>(device, layers, micro_batches, &waits);
        assert_eq!(got, 4, "waits of a step of {layers} layers and {micro_batches} micro-batches");
    }
}

#[test]
fn a_step_on_the_host_reads_at_its_end_alone() {
    check::<f32, Cpu>(&Cpu::poisoned(1), Cpu::waits);
}

#[cfg(feature = "cuda")]
#[test]
fn a_step_on_a_gpu_waits_at_its_end_alone() {
    use moe_kernels::{Cuda, bf16, cuda};

    if !matches!(cuda::probe(), Ok(count) if count > 0) {
        assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "no CUDA device");
        eprintln!("skipped: no CUDA device");
        return;
    }
    check::<bf16, Cuda>(&Cuda::poisoned(0).unwrap(), Cuda::waits);
}
