//! Several instances of the distributed optimizer: state cut over a part of the replicas and kept by each part, the
//! mathematics of one rank.

mod common;

use std::path::Path;

use common::checkpoints::{meta, tensors};
use common::{
    DEADLINE, Outcome, RandomBatches, assert_equal, assert_same_bits, check, gather, pieces, setup,
    tiny_model, train,
};
use moe_comm::count::{Counted, Counters};
use moe_comm::{ThreadWorld, World};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::axes::INSTANCE_GROUPS;
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::{Attention, Expert, GroupKey, Mapping};
use moe_train::Error;
use moe_train::checkpoint::container::Checkpoint;
use moe_train::checkpoint::{restore, save};
use moe_train::trainer::{RankTrainer, Setup};

/// `(tp, cp, dp, pp, etp, ep)` and instances; the world is tp·cp·dp·pp.
type Sizes = ((usize, usize, usize, usize, usize, usize), usize);

fn mapping(((tp, cp, dp, pp, etp, ep), instances): Sizes) -> Mapping {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    mapping.split(Attention::CP_OUTER, cp).optimizer_instances(instances)
}

/// Key-value heads that ranks of TP4 share, and a matrix that embedding and head share.
fn model() -> ModelConfig {
    ModelConfig { num_attention_heads: 8, num_key_value_heads: 2, tie_word_embeddings: true, ..tiny_model() }
}

#[test]
fn instances_change_nothing() {
    let foldings: [(Sizes, DispatcherKind); 8] = [
        (((1, 1, 4, 1, 1, 2), 2), AllToAll),
        // Each rank has all, as without a distributed optimizer.
        (((1, 1, 4, 1, 1, 1), 4), AllToAll),
        (((1, 1, 6, 1, 1, 1), 3), AllToAll),
        (((2, 1, 2, 1, 1, 2), 2), AllGather),
        (((1, 2, 2, 1, 2, 1), 2), AllToAll),
        (((4, 1, 2, 1, 1, 4), 2), AllToAll),
        // The embedding on one stage, the head on the other.
        (((1, 1, 4, 2, 1, 2), 2), AllToAll),
        (((2, 1, 2, 3, 2, 1), 2), AllToAll),
    ];
    let foldings = foldings.map(|(sizes, dispatcher)| (mapping(sizes), dispatcher));
    check(&model(), foldings, 3, |setup| setup.global_batch_size = 12);
}

/// Under interleaved stages, with and without overlap.
#[test]
fn overlap_changes_no_bit_with_instances() {
    let train = |overlap| {
        let setup = setup(ModelConfig { num_hidden_layers: 4, ..model() }, mapping(((1, 1, 4, 2, 1, 1), 2)));
        let pipeline = PipelineLayout::even(4, 2, 2).unwrap();
        train(Setup { overlap_grad_reduce: overlap, overlap_param_gather: overlap, pipeline, ..setup }, 2)
    };
    assert_same_bits(&train(true), &train(false), "overlap");
}

/// Two instances of two ranks: reductions and gathers stay in an instance, one sum of a slice does not.
#[test]
fn only_sums_of_slices_leave_an_instance() {
    let counts = |instances: usize| {
        let setup =
            Setup { global_batch_size: 8, ..setup(tiny_model(), mapping(((1, 1, 4, 1, 1, 1), instances))) };
        let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
        let ranks = ThreadWorld::run(4, DEADLINE, move |world| {
            let counters = Counters::default();
            let world: Box<dyn World<Cpu>> = Box::new(Counted::new(world, counters.clone()));
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &*world, Cpu::poisoned(1))?;
            trainer.step(1, &source)?;
            let elements: usize = trainer.cx().params.buckets().iter().map(|bucket| bucket.slice.len()).sum();
            Ok::<_, Error>((counters.snapshot(), elements))
        });
        ranks.unwrap_or_else(|error| panic!("{error}")).swap_remove(1)
    };
    let (one, whole) = counts(1);
    let (two, halves) = counts(2);
    assert!(halves.abs_diff(2 * whole) < 64, "each instance has all: {whole} {halves}");
    // Of dense weights, of those that ranks of TP would share, and of experts.
    let inner = [INSTANCE_GROUPS[0].into(), INSTANCE_GROUPS[1].into(), Expert::EDP_INNER.into()];
    let outer = [Attention::DP_OUTER.into(), Expert::EDP_OUTER.into()];
    let elements = |groups: &[GroupKey], op| {
        let bytes: u64 =
            groups.iter().filter_map(|&group| two.get(&(group, op))).map(|count| count.bytes).sum();
        bytes as usize / size_of::<f64>()
    };
    assert_eq!(elements(&inner, "reduce_scatter"), 2 * halves);
    // The weights at the start, drawn slice by slice, and after the step.
    assert_eq!(elements(&inner, "all_gather"), 2 * halves);
    assert_eq!(elements(&outer, "all_reduce"), halves);
    assert!(one.keys().all(|(group, _)| !inner.contains(group) && !outer.contains(group)), "{one:?}");
}

/// A run of two steps from `from` (or the start) to step 4 or 2, saved.
fn run(sizes: Sizes, from: Option<&Path>, last: u64, root: &Path) -> Outcome {
    let setup = Setup { global_batch_size: 12, ..setup(model(), mapping(sizes)) };
    let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
    let (from, root) = (from.map(Path::to_owned), root.to_owned());
    let ranks = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
        let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
        let mut start = 0;
        if let Some(path) = &from {
            let checkpoint = Checkpoint::open(path)?;
            restore(&mut trainer, &checkpoint)?;
            start = checkpoint.step();
            save(&trainer, &root, start, &meta(&setup, start, start))?;
        }
        let reports = (start + 1..=last).map(|step| trainer.step(step, &source)).collect::<Result<_, _>>()?;
        if last > start {
            save(&trainer, &root, last, &meta(&setup, last, last))?;
        }
        Ok::<_, Error>((reports, pieces(&trainer)?))
    });
    gather(ranks.unwrap_or_else(|error| panic!("{error}")))
}

/// Nothing of instances is in a checkpoint, and what all hold is written once.
#[test]
fn any_number_of_instances_goes_on_from_any_other() {
    let one = ((1, 1, 1, 1, 1, 1), 1);
    let folder = tempfile::tempdir().unwrap();
    let mut whole = run(one, None, 4, folder.path());
    whole.reports.drain(..2);
    let reference = setup(model(), mapping(one));
    let cases: [Sizes; 4] =
        [((1, 1, 4, 1, 1, 2), 2), ((1, 1, 4, 2, 1, 1), 4), ((2, 1, 3, 1, 1, 2), 3), ((1, 1, 4, 1, 1, 2), 1)];
    for writer in cases {
        let folder = tempfile::tempdir().unwrap();
        run(writer, None, 2, folder.path());
        let path = folder.path().join("step-2");
        let written = tensors(&path);
        for reader in cases {
            let what = format!("{writer:?} to {reader:?}");
            let again = tempfile::tempdir().unwrap();
            let resumed = run(reader, Some(&path), 4, again.path());
            assert!(tensors(&again.path().join("step-2")) == written, "{what}");
            assert_equal(&resumed, &whole, &reference, &what);
        }
    }
}
