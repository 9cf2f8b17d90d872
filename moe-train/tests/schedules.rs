//! Every schedule trains, and no bit depends on it: losses, gradients (the first moments are made of them) and weights are
//! those of 1F1B under the same folding, with virtual stages and uneven layers.

mod common;

use common::{DEADLINE, RandomBatches, assert_same_bits, setup, tiny_model, train};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::config::{AuxLoss, AuxLossScope, HiddenAct, ScoringFunc};
use moe_model::{ModelConfig, PipelineLayout, RecomputeModule, RecomputeModules};
use moe_pipeline::generate::Named;
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{BatchSource, RankTrainer, Setup};

const LAYERS: usize = 7;
const STEPS: u64 = 2;

/// `(tp, cp, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize);

/// All axes, alone and together; 12, 6 and 4 micro-batches per data-parallel rank.
const FOLDINGS: [(Sizes, DispatcherKind); 6] = [
    ((1, 1, 1, 2, 1, 1), AllToAll),
    ((2, 1, 1, 2, 1, 2), AllGather),
    ((1, 1, 2, 3, 2, 1), AllToAll),
    ((2, 1, 2, 2, 1, 4), AllToAll),
    ((1, 2, 1, 3, 1, 2), AllToAll),
    ((2, 2, 3, 2, 2, 2), AllToAll),
];

/// Schedules of one stage per rank, and of two.
const OF_ONE: [Named; 5] = [Named::OneFOneB, Named::GPipe, Named::Overlapped1F1B, Named::ZbH1, Named::ZbH2];
const OF_TWO: [Named; 8] = [
    Named::Interleaved1F1B,
    Named::BreadthFirst,
    Named::Overlapped1F1B,
    Named::InterleavedZeroBubble,
    // The first and the last stage are on one rank.
    Named::ZbV,
    Named::VHalf,
    Named::VMin,
    Named::DualPipeV,
];

/// One or two stages per rank, of layers that are as even as they can be, or are not.
#[derive(Debug, Clone, Copy)]
enum Deal {
    Even(usize),
    Uneven(usize),
}
use Deal::{Even, Uneven};

fn layout(pp: usize, deal: Deal) -> PipelineLayout {
    match deal {
        Even(virtual_stages) => PipelineLayout::even(LAYERS, pp, virtual_stages),
        Uneven(virtual_stages) => {
            let layers: &[usize] = match pp * virtual_stages {
                2 => &[5, 2],
                3 => &[2, 5, 0],
                4 => &[0, 3, 1, 3],
                6 => &[0, 2, 1, 1, 3, 0],
                stages => panic!("{stages} stages"),
            };
            PipelineLayout::new(LAYERS, pp, layers)
        }
    }
    .unwrap()
}

fn case(
    model: &ModelConfig,
    (tp, cp, dp, pp, etp, ep): Sizes,
    dispatcher: DispatcherKind,
    deal: Deal,
    schedule: Named,
) -> Setup {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    // A ring.
    let mapping = mapping.split(Attention::CP_INNER, 1);
    let layout = layout(pp, deal);
    let placement = schedule.placement(pp as u32, layout.virtual_stages() as u32).unwrap();
    let pipeline = layout.placed(placement).unwrap();
    Setup { pipeline, schedule, dispatcher, global_batch_size: 12, ..setup(model.clone(), mapping) }
}

fn seven(model: ModelConfig) -> ModelConfig {
    let model = ModelConfig { num_hidden_layers: LAYERS, ..model };
    model.check().unwrap();
    model
}

/// All schedules over these stages under one folding.
fn check(
    model: &ModelConfig,
    sizes: Sizes,
    dispatcher: DispatcherKind,
    deals: &[Deal],
    tweak: fn(&mut Setup),
) {
    let train = |deal, schedule| {
        let mut setup = case(model, sizes, dispatcher, deal, schedule);
        tweak(&mut setup);
        train(setup, STEPS)
    };
    let reference = train(Even(1), Named::OneFOneB);
    assert!(reference.reports.iter().all(|report| report.grad_norm > 1.0), "clipping has something to do");
    for &deal in deals {
        let schedules = match deal {
            Even(1) | Uneven(1) => &OF_ONE[..],
            _ => &OF_TWO[..],
        };
        for &schedule in schedules {
            let what = format!("{sizes:?} {deal:?} {schedule}");
            assert_same_bits(&train(deal, schedule), &reference, &what);
        }
    }
}

const ALL_DEALS: [Deal; 4] = [Even(1), Uneven(1), Even(2), Uneven(2)];

#[test]
fn no_bit_depends_on_the_schedule() {
    let model = seven(tiny_model());
    for (sizes, dispatcher) in FOLDINGS {
        check(&model, sizes, dispatcher, &ALL_DEALS, |_| {});
    }
}

/// Weight gradients of every kind of tensor, one of them added to by two stages on one or two ranks, and statistics and buffers beside them.
#[test]
fn nor_with_every_kind_of_layer() {
    let model = seven(ModelConfig {
        tie_word_embeddings: true,
        mlp_only_layers: vec![1, 4],
        moe_intermediate_size: Some(12),
        intermediate_size: 18,
        shared_expert_intermediate_size: Some(6),
        hidden_act: HiddenAct::GeluPytorchTanh,
        use_qk_norm: true,
        attention_bias: true,
        mlp_bias: true,
        expert_mlp_bias: true,
        pad_token_id: Some(5),
        scoring_func: ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        router_aux_loss_coef: None,
        router_aux_losses: vec![
            AuxLoss { scope: AuxLossScope::Global, coef: 0.02 },
            AuxLoss { scope: AuxLossScope::Sequence, coef: 0.03 },
        ],
        ..tiny_model()
    });
    for (sizes, dispatcher) in FOLDINGS {
        check(&model, sizes, dispatcher, &[Even(1), Uneven(2)], |setup| {
            setup.expert_bias_update_rate = 0.02;
            setup.moe_shared_expert_overlap = true;
        });
    }
}

/// What is made again is made in the pass of the input gradient; a loss over all layers travels with the activations.
#[test]
fn nor_with_latent_attention_and_recomputation() {
    let model = seven(ModelConfig {
        num_key_value_heads: 12,
        head_dim: None,
        kv_lora_rank: Some(14),
        q_lora_rank: Some(10),
        qk_nope_head_dim: Some(3),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        router_aux_loss_coef: None,
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Model, coef: 0.06 }],
        ..tiny_model()
    });
    for (sizes, dispatcher) in FOLDINGS.into_iter().skip(2).step_by(2) {
        check(&model, sizes, dispatcher, &[Even(1), Uneven(2)], |setup| {
            let modules = [RecomputeModule::CoreAttn, RecomputeModule::Layernorm, RecomputeModule::MoeAct];
            setup.recompute = RecomputeModules::new(&modules, &setup.model).unwrap();
            setup.overlap_grad_reduce = false;
        });
        check(&model, sizes, dispatcher, &[Uneven(1), Even(2)], |setup| {
            setup.recompute = RecomputeModules::new(&[RecomputeModule::Full], &setup.model).unwrap();
            setup.overlap_param_gather = false;
        });
    }
}

/// Any number of micro-batches, also one that a schedule does not train.
#[test]
fn evaluation_follows_the_stages() {
    let loss = |deal, schedule| {
        let sizes = (2, 1, 2, 2, 1, 4);
        let setup = case(&seven(tiny_model()), sizes, AllToAll, deal, schedule);
        let source = RandomBatches { vocab: 37, seq_len: setup.sequence_length, micro_batch: 1 };
        let losses = ThreadWorld::run(setup.folding.world_size(), DEADLINE, move |world| {
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            trainer.step(1, &source)?;
            Ok::<_, moe_train::Error>([2, 6].map(|n| trainer.evaluate(n, |u| source.micro_batch(7, u))))
        })
        .unwrap_or_else(|error| panic!("{error}"));
        let losses: Vec<[u64; 2]> =
            losses.into_iter().map(|losses| losses.map(|loss| loss.unwrap().unwrap().to_bits())).collect();
        assert!(losses.windows(2).all(|pair| pair[0] == pair[1]));
        losses[0]
    };
    let reference = loss(Even(1), Named::OneFOneB);
    for schedule in OF_TWO {
        assert_eq!(loss(Uneven(2), schedule), reference, "{schedule}");
    }
}

#[test]
fn stages_that_are_elsewhere_are_refused() {
    let model = seven(tiny_model());
    for (placed_for, schedule) in [(Named::ZbV, Named::Interleaved1F1B), (Named::BreadthFirst, Named::VMin)] {
        let setup = case(&model, FOLDINGS[0].0, AllToAll, Even(2), placed_for);
        let error = Setup { schedule, ..setup }.training_program(12).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{schedule} has stages on other ranks than the pipeline's layout")),
            "{error}"
        );
    }
}
