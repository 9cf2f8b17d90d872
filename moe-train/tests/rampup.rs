//! Steps that grow: each is what it is alone, under any folding, and a run goes on from the middle of the ramp.

mod common;

use common::{
    DEADLINE, RandomBatches, assert_same_bits, check, gather, pieces, setup, tiny_model, train, train_on,
};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::config::{AuxLoss, AuxLossScope};
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Mapping};
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::{restore, save};
use moe_train::data::RampUp;
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup};

/// Both load-balancing losses and the z-loss, so that every constant of the objective counts.
fn model() -> ModelConfig {
    let loss = |scope, coef| AuxLoss { scope, coef };
    ModelConfig {
        router_aux_loss_coef: None,
        router_aux_losses: vec![loss(AuxLossScope::MicroBatch, 0.03), loss(AuxLossScope::Sequence, 0.02)],
        ..tiny_model()
    }
}

/// Steps of 4, 4, 8, 12, 12, … sequences.
fn ramp(setup: &mut Setup) {
    setup.global_batch_size = 12;
    setup.rampup_batch_size = Some(RampUp { start: 4, increment: 4, samples: 15 });
}

#[test]
fn sizes_are_as_described() {
    let mut setup = setup(model(), Mapping::default());
    ramp(&mut setup);
    let sizes = setup.batch_sizes().unwrap();
    assert_eq!((1..=5).map(|step| sizes.of_step(step)).collect::<Vec<_>>(), [4, 4, 8, 12, 12]);
}

#[test]
fn foldings_agree() {
    let mapping = |world_size, tp, pp, etp, ep| Mapping { world_size, tp, pp, etp, ep, ..Mapping::default() };
    let foldings = [
        (mapping(4, 1, 1, 1, 4), AllToAll),
        (mapping(4, 2, 1, 2, 2), AllGather),
        // One micro-batch per rank at first: fewer than stages.
        (mapping(8, 1, 2, 2, 2), AllToAll),
    ];
    check(&model(), foldings, 4, ramp);
    // Interleaved stages, in groups of two micro-batches.
    let foldings = [(mapping(4, 1, 2, 1, 2), AllToAll)];
    check(&ModelConfig { num_hidden_layers: 4, ..model() }, foldings, 4, |setup| {
        ramp(setup);
        let stages = setup.folding.size(Attention::PP);
        setup.pipeline = PipelineLayout::even(4, stages, stages).unwrap();
    });
}

/// Counts the micro-batches that it gives, and gives those of another step.
struct Later(RandomBatches, u64);

impl BatchSource for Later {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        self.0.micro_batch(step + self.1, u)
    }
}

/// The first step of a run of four sequences a step, and the third of a run that starts with 4, 4 and 8 where learning rates
/// are 0 until then, are those of runs of that size.
#[test]
fn a_step_of_the_ramp_is_a_step_of_that_size() {
    let source = |setup: &Setup| RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    };
    let mut ramped = setup(model(), Mapping { world_size: 2, ep: 2, ..Mapping::default() });
    ramp(&mut ramped);
    (ramped.lr.max, ramped.lr.min) = (0.0, 0.0);
    let of_ramp = train(ramped.clone(), 4).reports;
    for (step, size) in [(1, 4), (3, 8), (4, 12)] {
        let alone = Setup { global_batch_size: size, rampup_batch_size: None, ..ramped.clone() };
        let later = Later(source(&alone), step - 1);
        let mut report = train_on(alone, 1, later).reports.remove(0);
        report.step = step;
        assert_eq!(report, of_ramp[step as usize - 1]);
    }
}

#[test]
fn a_run_goes_on_from_the_middle_of_the_ramp() {
    let folder = tempfile::tempdir().unwrap();
    let mut setup = setup(model(), Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() });
    ramp(&mut setup);
    let run = |first: u64, last: u64, from: Option<u64>, saves: bool| {
        let (setup, root) = (setup.clone(), folder.path().to_owned());
        let ranks = ThreadWorld::run(4, DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 12, micro_batch: 1 };
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            if let Some(step) = from {
                restore(&mut trainer, &Checkpoint::open(&root.join(format!("step-{step}")))?)?;
            }
            let mut reports = Vec::new();
            for step in first..=last {
                reports.push(trainer.step(step, &source)?);
                if saves && step == 2 {
                    let meta = common::checkpoints::meta(&setup, step, trainer.optimizer().updates());
                    save(&trainer, &root, step, &meta)?;
                }
            }
            Ok::<_, moe_train::Error>((reports, pieces(&trainer)?))
        });
        gather(ranks.unwrap_or_else(|error| panic!("{error}")))
    };
    let mut whole = run(1, 4, None, true);
    whole.reports.drain(..2);
    assert_same_bits(&run(3, 4, Some(2), false), &whole, "resumed after step 2");
}
