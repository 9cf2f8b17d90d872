//! Padding is nothing: what is left of a step is what it would be without, under any folding.

mod common;

use common::{RandomBatches, assert_equal, assert_same_bits, setup, tiny_model, train_on};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_dispatch::capacity::DropPolicy;
use moe_model::capacity::{DropUnit, ExpertCapacity};
use moe_model::config::{AuxLoss, AuxLossScope, ScoringFunc};
use moe_model::{ModelConfig, RecomputeModule, RecomputeModules};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{BatchSource, Sequence, Setup};

/// Random sequences, of which the g-th of a step ends with as much padding as a pattern says.
#[derive(Clone)]
struct Padded {
    source: RandomBatches,
    padding: Vec<usize>,
    /// Where documents start.
    documents: Vec<usize>,
}

impl Padded {
    fn new(setup: &Setup, padding: &[usize]) -> Self {
        let source = RandomBatches {
            vocab: setup.model.vocab_size as u32,
            seq_len: setup.sequence_length,
            micro_batch: setup.micro_batch_size,
        };
        Padded { source, padding: padding.to_vec(), documents: Vec::new() }
    }
}

impl BatchSource for Padded {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let sequences = self.source.micro_batch(step, u)?.into_iter().enumerate();
        let padding = |b: usize| self.padding[(u * self.source.micro_batch + b) % self.padding.len()];
        Ok(sequences
            .map(|(b, sequence)| sequence.separated(self.documents.iter().copied()).padded(padding(b)))
            .collect())
    }
}

/// The first `length` inputs of all sequences of a source.
struct Cut(Padded, usize);

impl BatchSource for Cut {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let Cut(source, length) = self;
        let cut = |whole: Sequence| {
            Sequence::new(whole.tokens[..=*length].to_vec(), whole.weights[..*length].to_vec())
        };
        Ok(source.micro_batch(step, u)?.into_iter().map(cut).collect())
    }
}

/// All losses of routers.
fn model() -> ModelConfig {
    let loss = |scope, coef| AuxLoss { scope, coef };
    ModelConfig {
        router_aux_loss_coef: None,
        router_aux_losses: vec![
            loss(AuxLossScope::MicroBatch, 0.03),
            loss(AuxLossScope::Sequence, 0.02),
            loss(AuxLossScope::Global, 0.05),
        ],
        first_k_dense_replace: 1,
        shared_expert_intermediate_size: Some(6),
        ..tiny_model()
    }
}

/// Sequences of 7 tokens and 5 of padding are sequences of 7 tokens, with every loss and statistic.
#[test]
fn padded_sequences_are_shorter_sequences() {
    let sigmoid = ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        sliding_window: Some(4),
        ..model()
    };
    for model in [model(), sigmoid] {
        let mut long = Setup { global_batch_size: 8, ..setup(model, Mapping::default()) };
        (long.micro_batch_size, long.expert_bias_update_rate) = (2, 0.05);
        let short = Setup { sequence_length: 7, ..long.clone() };
        let source = Padded::new(&long, &[5]);
        let padded = train_on(long, 3, source.clone());
        let cut = train_on(short.clone(), 3, Cut(source, 7));
        assert_equal(&padded, &cut, &short, "5 of 12 padded");
        for (padded, cut) in padded.reports.iter().zip(&cut.reports) {
            assert!((padded.sequence_aux_loss - cut.sequence_aux_loss).abs() < 1e-12);
            assert!((padded.global_aux_loss - cut.global_aux_loss).abs() < 1e-12);
        }
    }
}

/// Half of the sequences are padding: a step of the others. Losses whose mean is over micro-batches or sequences are off,
/// since there are as many of these as before.
#[test]
fn padded_micro_batches_are_none() {
    let model = ModelConfig {
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Global, coef: 0.05 }],
        ..model()
    };
    let eight = Setup { global_batch_size: 8, ..setup(model, Mapping::default()) };
    let four = Setup { global_batch_size: 4, ..eight.clone() };
    let source = Padded::new(&eight, &[0, 0, 0, 0, 12, 12, 12, 12]);
    let mut padded = train_on(eight, 2, source.clone());
    let alone = train_on(four.clone(), 2, Padded::new(&four, &[0]));
    for (padded, alone) in padded.reports.iter_mut().zip(&alone.reports) {
        assert!((2.0 * padded.aux_loss - alone.aux_loss).abs() < 1e-12);
        padded.aux_loss = alone.aux_loss;
    }
    assert_equal(&padded, &alone, &four, "half of the micro-batches padded");
}

#[test]
fn a_step_of_padding_updates_nothing() {
    let setup = Setup {
        global_batch_size: 4,
        ..setup(model(), Mapping { world_size: 2, ep: 2, ..Mapping::default() })
    };
    let report = train_on(setup.clone(), 1, Padded::new(&setup, &[12])).reports.remove(0);
    assert_eq!((report.loss, report.updated, report.grad_norm), (None, false, 0.0));
    assert_eq!((report.aux_loss, report.global_aux_loss, report.z_loss), (0.0, 0.0, 0.0));
    assert!(report.expert_load.iter().flatten().all(|&load| load == 0.0));
}

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn check(
    model: &ModelConfig,
    foldings: &[(Sizes, DispatcherKind)],
    padding: &[usize],
    documents: &[usize],
    tweak: impl Fn(&mut Setup),
) {
    let run = |mapping: Mapping, dispatcher| {
        let mut setup = setup(model.clone(), mapping);
        (setup.sequence_length, setup.global_batch_size) = (24, 8);
        tweak(&mut setup);
        setup.dispatcher = dispatcher;
        let source = Padded { documents: documents.to_vec(), ..Padded::new(&setup, padding) };
        (train_on(setup.clone(), 2, source), setup)
    };
    let (one, setup) = run(Mapping::default(), AllToAll);
    for &((tp, cp, ulysses, dp, pp, etp, ep), dispatcher) in foldings {
        let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
        let what = format!("{mapping}, cp_ulysses {ulysses}, {dispatcher}");
        let (folded, _) = run(mapping.split(Attention::CP_INNER, ulysses), dispatcher);
        assert_equal(&folded, &one, &setup, &what);
        for (folded, one) in folded.reports.iter().zip(&one.reports) {
            assert!((folded.global_aux_loss - one.global_aux_loss).abs() < 1e-12, "{what}");
            assert_eq!(folded.dropped_tokens, one.dropped_tokens, "{what}");
        }
    }
}

/// Uneven: a data-parallel rank of padding only, padding over whole chunks and parts of ranks, single valid tokens.
const UNEVEN: [usize; 8] = [24, 3, 23, 0, 24, 12, 24, 17];

#[test]
fn foldings_agree() {
    let foldings = [
        ((2, 1, 1, 1, 1, 1, 2), AllToAll),
        ((4, 1, 1, 1, 1, 4, 1), AllGather),
        // The first of two ranks has the even micro-batches: 24, 23, 24, 24.
        ((1, 1, 1, 2, 1, 1, 2), AllToAll),
        ((1, 1, 1, 8, 1, 1, 8), AllToAll),
        ((1, 1, 1, 8, 1, 4, 2), AllGather),
        ((1, 4, 1, 1, 1, 1, 4), AllToAll),
        ((1, 3, 3, 1, 1, 3, 1), AllToAll),
        ((2, 2, 1, 2, 2, 1, 8), AllToAll),
        ((3, 4, 2, 1, 1, 3, 4), AllToAll),
    ];
    let model = ModelConfig { num_attention_heads: 12, num_key_value_heads: 12, ..model() };
    check(&model, &foldings, &UNEVEN, &[], |_| {});
}

#[test]
fn with_documents_and_several_sequences_in_a_micro_batch() {
    let foldings = [
        ((2, 2, 1, 2, 1, 1, 8), AllToAll),
        ((1, 6, 3, 1, 1, 3, 2), AllGather),
        ((1, 2, 2, 2, 2, 2, 2), AllToAll),
    ];
    let model =
        ModelConfig { scoring_func: ScoringFunc::Sigmoid, moe_router_enable_expert_bias: true, ..model() };
    check(&model, &foldings, &UNEVEN, &[1, 7, 8, 20], |setup| {
        setup.micro_batch_size = 2;
        setup.expert_bias_update_rate = 0.05;
    });
}

/// Backward makes again what it does not keep, with the same padding and documents.
#[test]
fn recomputed() {
    let mapping = Mapping { world_size: 4, tp: 2, cp: 2, ep: 4, ..Mapping::default() };
    let mut setup = setup(model(), mapping.split(Attention::CP_INNER, 1));
    (setup.sequence_length, setup.global_batch_size, setup.micro_batch_size) = (24, 8, 2);
    let source = Padded { documents: vec![1, 7, 20], ..Padded::new(&setup, &UNEVEN) };
    let kept = train_on(setup.clone(), 2, source.clone());
    for module in [RecomputeModule::Full, RecomputeModule::Moe, RecomputeModule::CoreAttn] {
        let recompute = RecomputeModules::new(&[module], &setup.model).unwrap();
        let again = train_on(Setup { recompute, ..setup.clone() }, 2, source.clone());
        assert_same_bits(&again, &kept, &format!("{module:?}"));
    }
}

/// Padding takes no place of an expert, though it counts as slots.
#[test]
fn with_capacities() {
    let foldings = [((2, 2, 1, 2, 1, 1, 8), AllToAll), ((1, 1, 1, 4, 1, 2, 2), AllGather)];
    for (policy, pad) in [(DropPolicy::Probs, false), (DropPolicy::Position, true)] {
        check(&model(), &foldings, &UNEVEN, &[], |setup| {
            setup.micro_batch_size = 2;
            setup.capacity = Some(ExpertCapacity { factor: 0.5, policy, unit: DropUnit::MICRO_BATCH, pad });
        });
    }
}

/// Padding has no part in what Sinkhorn's iterations sum, and a record says that it goes nowhere.
#[test]
fn padding_under_sinkhorn_and_replay() {
    let model = ModelConfig {
        moe_router_sinkhorn_iterations: Some(12),
        router_aux_loss_coef: Some(0.0),
        router_jitter_noise: 0.1,
        ..tiny_model()
    };
    let with = |mapping| Setup { global_batch_size: 8, micro_batch_size: 2, ..setup(model.clone(), mapping) };
    let one = with(Mapping::default());
    let source = Padded::new(&one, &[5, 0, 12, 3]);
    let folder = tempfile::tempdir().unwrap();
    let record = Setup { record_routing: Some(folder.path().to_owned()), ..one.clone() };
    let reference = train_on(record, 2, source.clone());
    let replay = Setup { replay_routing: Some(folder.path().to_owned()), ..one.clone() };
    assert_equal(&train_on(replay, 2, source.clone()), &reference, &one, "replayed");
    for (tp, cp, pp, ep) in [(2, 1, 1, 4), (1, 2, 1, 2), (2, 1, 3, 1)] {
        let mapping = Mapping { world_size: 2 * tp * cp * pp, tp, cp, pp, ep, ..Mapping::default() };
        let what = format!("{mapping}");
        assert_equal(&train_on(with(mapping), 2, source.clone()), &reference, &one, &what);
    }
    // Cut where padding starts, the same is left: the choice knows nothing of the rest.
    let short =
        Setup { sequence_length: 7, model: ModelConfig { router_jitter_noise: 0.0, ..model.clone() }, ..one };
    let long = Setup { sequence_length: 12, ..short.clone() };
    let source = Padded::new(&long, &[5]);
    let (padded, cut) = (train_on(long, 2, source.clone()), train_on(short.clone(), 2, Cut(source, 7)));
    assert_equal(&padded, &cut, &short, "5 of 12 padded");
}
