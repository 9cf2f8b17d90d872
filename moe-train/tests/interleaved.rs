//! Several stages per pipeline rank and uneven layers: the mathematics of one rank, the bits of 1F1B.

mod common;

use common::{DEADLINE, RandomBatches, assert_equal, assert_same_bits, setup, tiny_model, train};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::{ModelConfig, PipelineLayout};
use moe_topology::Mapping;
use moe_train::trainer::{BatchSource, RankTrainer, Setup};

const LAYERS: usize = 7;
const STEPS: u64 = 2;

/// `(tp, dp, pp, etp, ep)`; the world is tp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize);

/// How the seven layers are dealt to pipeline ranks.
#[derive(Debug, Clone, Copy)]
enum Deal {
    /// Evenly over so many virtual stages per rank.
    Even(usize),
    /// So many per stage.
    Listed(&'static [usize]),
}
use Deal::{Even, Listed};

fn case((tp, dp, pp, etp, ep): Sizes, deal: Deal, group: Option<usize>) -> Setup {
    let model = ModelConfig { num_hidden_layers: LAYERS, ..tiny_model() };
    let mapping = Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() };
    let pipeline = match deal {
        Even(virtual_stages) => PipelineLayout::even(LAYERS, pp, virtual_stages),
        Listed(layers) => PipelineLayout::new(LAYERS, pp, layers),
    }
    .unwrap();
    Setup { pipeline, micro_batch_group_size: group, global_batch_size: 12, ..setup(model, mapping) }
}

#[test]
fn virtual_stages_and_uneven_layers_change_nothing() {
    let one = case((1, 1, 1, 1, 1), Even(1), None);
    let reference = train(one.clone(), STEPS);
    let cases: &[(Sizes, Deal, Option<usize>, DispatcherKind)] = &[
        ((1, 1, 2, 1, 1), Even(2), None, AllToAll),
        ((1, 1, 2, 1, 1), Even(3), Some(4), AllToAll),
        ((1, 1, 3, 1, 1), Even(2), Some(12), AllToAll),
        // With every other axis; 6 and 4 micro-batches per data-parallel rank.
        ((2, 1, 2, 1, 2), Even(3), None, AllToAll),
        ((1, 2, 2, 2, 1), Even(2), None, AllToAll),
        ((2, 2, 2, 1, 4), Even(2), Some(3), AllToAll),
        ((2, 2, 2, 2, 2), Even(3), None, AllGather),
        ((3, 1, 3, 3, 1), Even(2), None, AllToAll),
        ((1, 3, 2, 1, 1), Even(2), Some(4), AllToAll),
        // Uneven: ends without any layer, all on one stage, four ranks of 1F1B.
        ((2, 1, 2, 2, 1), Listed(&[1, 3, 2, 1]), None, AllToAll),
        ((1, 2, 2, 1, 2), Listed(&[0, 4, 1, 2]), None, AllToAll),
        ((1, 2, 2, 1, 2), Listed(&[0, 3, 4, 0]), None, AllToAll),
        ((1, 1, 2, 1, 1), Listed(&[7, 0]), None, AllToAll),
        ((1, 1, 4, 1, 1), Listed(&[1, 2, 4, 0]), None, AllToAll),
        ((1, 1, 3, 1, 1), Listed(&[1, 1, 1, 2, 1, 1]), None, AllToAll),
    ];
    for &(sizes, deal, group, dispatcher) in cases {
        let folded = train(Setup { dispatcher, ..case(sizes, deal, group) }, STEPS);
        assert_equal(&folded, &reference, &one, &format!("{sizes:?} {deal:?} {group:?} {dispatcher}"));
    }
}

/// The schedule and the place of a layer change no bit of a loss, a gradient, the norm (clipping scales by it) or a weight:
/// what is cut over data-parallel ranks is cut layer by layer.
#[test]
fn the_schedule_changes_no_bit() {
    for (sizes, others) in [
        (
            (1, 1, 2, 1, 1),
            &[(Even(3), Some(4)), (Listed(&[3, 1, 2, 1]), Some(12)), (Listed(&[6, 1]), None)][..],
        ),
        ((2, 1, 2, 1, 2), &[(Even(2), Some(12)), (Listed(&[3, 1, 2, 1]), None), (Listed(&[6, 1]), None)]),
        ((1, 2, 3, 2, 1), &[(Even(2), None), (Listed(&[0, 2, 1, 1, 2, 1]), None)]),
        ((2, 2, 2, 1, 4), &[(Even(3), None), (Listed(&[2, 5]), None)]),
        ((1, 3, 2, 1, 1), &[(Even(2), Some(4)), (Listed(&[0, 4, 3, 0]), None)]),
    ] {
        let train = |deal, group| train(case(sizes, deal, group), STEPS);
        let reference = train(Even(1), None);
        assert!(
            reference.reports.iter().all(|report| report.grad_norm > 1.0),
            "clipping has something to do"
        );
        for &(deal, group) in others {
            assert_same_bits(&train(deal, group), &reference, &format!("{sizes:?} {deal:?} {group:?}"));
        }
    }
}

/// Any number of micro-batches, also one that interleaved training does not take.
#[test]
fn evaluation_goes_through_the_same_stages() {
    let loss = |setup: Setup| {
        let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
        let losses = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            trainer.step(1, &source)?;
            trainer.evaluate(6, |u| source.micro_batch(7, u))
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert!(losses.windows(2).all(|pair| pair[0] == pair[1]));
        losses[0].unwrap()
    };
    let one = loss(case((1, 1, 1, 1, 1), Even(1), None));
    for (sizes, deal) in [
        ((1, 2, 2, 1, 2), Even(3)),
        ((2, 2, 2, 1, 4), Even(2)),
        ((1, 2, 3, 1, 1), Even(2)),
        ((1, 1, 4, 1, 1), Listed(&[0, 4, 3, 0])),
    ] {
        let folded = loss(case(sizes, deal, None));
        assert!((folded - one).abs() < 1e-12 * one, "{sizes:?} {deal:?}: {folded} and {one}");
    }
}

#[test]
fn too_few_micro_batches_are_refused() {
    let setup = Setup { global_batch_size: 5, ..case((1, 1, 2, 1, 1), Even(2), None) };
    let error = setup.training_program(5).unwrap_err().to_string();
    assert!(error.ends_with("the nearest numbers of micro-batches: 4, 6; or one group of 5"), "{error}");
    assert!(Setup { micro_batch_group_size: Some(5), ..setup }.training_program(5).is_ok());
}
