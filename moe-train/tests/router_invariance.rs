//! The mapping never changes what a router computes: sigmoid scores, groups, scaling, losses of several scopes.

mod common;

use common::{RandomBatches, assert_equal, setup, tiny_model, train, train_on};
use moe_comm::ThreadWorld;
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_kernels::Cpu;
use moe_model::config::{AuxLoss, AuxLossScope, RouterDType, ScoringFunc};
use moe_model::{ForcedRouting, ModelConfig, PipelineLayout};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::{BatchSource, RankTrainer, Sequence, Setup};

/// `(tp, cp, cp_ulysses, dp, pp, etp, ep)`.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

/// EP beyond DP, ETP above and below TP, stages, three-way axes, sequences in chunks by ring and by all-to-all.
const FOLDINGS: [(Sizes, DispatcherKind); 9] = [
    ((2, 1, 1, 2, 1, 1, 4), AllToAll),
    ((1, 1, 1, 4, 1, 4, 1), AllGather),
    ((6, 1, 1, 1, 1, 3, 2), AllToAll),
    ((2, 1, 1, 2, 2, 1, 4), AllGather),
    ((2, 1, 1, 4, 1, 1, 8), AllToAll),
    ((3, 1, 1, 2, 3, 2, 1), AllToAll),
    ((1, 2, 1, 2, 1, 1, 4), AllToAll),
    ((3, 2, 2, 1, 1, 3, 2), AllGather),
    ((1, 2, 1, 1, 2, 2, 1), AllToAll),
];

fn check(model: ModelConfig) {
    check_with(model, |_| ());
}

fn check_with(model: ModelConfig, tweak: impl Fn(&mut Setup)) {
    model.check().unwrap();
    let foldings = FOLDINGS.map(|((tp, cp, ulysses, dp, pp, etp, ep), dispatcher)| {
        let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
        (mapping.split(Attention::CP_INNER, ulysses), dispatcher)
    });
    common::check(&model, foldings, 2, |setup| {
        (setup.global_batch_size, setup.micro_batch_size) = (8, 2);
        setup.expert_bias_update_rate = 0.05;
        tweak(setup);
    });
}

fn losses(micro_batch: f64, sequence: f64) -> Vec<AuxLoss> {
    vec![
        AuxLoss { scope: AuxLossScope::Sequence, coef: sequence },
        AuxLoss { scope: AuxLossScope::MicroBatch, coef: micro_batch },
    ]
}

#[test]
fn sigmoid_scores_in_groups_with_the_loss_of_each_sequence() {
    check(ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        n_group: 4,
        topk_group: 2,
        routed_scaling_factor: 2.5,
        router_aux_loss_coef: None,
        router_aux_losses: losses(0.0, 0.05),
        ..tiny_model()
    });
}

#[test]
fn unnormalised_sigmoids_with_losses_of_two_scopes() {
    check(ModelConfig {
        scoring_func: ScoringFunc::Sigmoid,
        norm_topk_prob: false,
        router_aux_loss_coef: None,
        router_aux_losses: losses(0.04, 0.03),
        ..tiny_model()
    });
}

#[test]
fn roots_of_softplus_with_a_bias() {
    check(ModelConfig {
        scoring_func: ScoringFunc::SqrtSoftplus,
        moe_router_enable_expert_bias: true,
        routed_scaling_factor: 1.5,
        ..tiny_model()
    });
}

#[test]
fn softmax_in_groups_judged_by_their_best_expert() {
    check(ModelConfig {
        scoring_func: ScoringFunc::Softmax,
        norm_topk_prob: false,
        n_group: 2,
        topk_group: 1,
        group_score_topk: 1,
        routed_scaling_factor: 1.5,
        ..tiny_model()
    });
}

/// The noise on a token is the same whichever rank has it, in every pass of a step; an evaluation has none.
#[test]
fn jitter_is_keyed_by_token_and_step() {
    let model = ModelConfig {
        router_jitter_noise: 0.2,
        router_aux_loss_coef: None,
        router_aux_losses: [global(0.07), losses(0.04, 0.03)].concat(),
        ..tiny_model()
    };
    check(model.clone());
    let losses = |jitter, seed| {
        let model = ModelConfig { router_jitter_noise: jitter, ..model.clone() };
        let mut setup = setup(model, Mapping::default());
        setup.lr.max = 0.0;
        setup.lr.min = 0.0;
        let ranks = ThreadWorld::run(1, common::DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 12, micro_batch: 1 };
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            let again = Again(source.clone());
            let (first, second) = (trainer.step(seed, &again)?, trainer.step(seed + 1, &again)?);
            let eval = trainer.evaluate(4, |u| source.micro_batch(9, u))?;
            Ok::<_, moe_train::Error>([first.loss, second.loss, eval].map(Option::unwrap))
        })
        .unwrap_or_else(|error| panic!("{error}"));
        ranks[0]
    };
    let ([quiet, same, eval], [noisy, other, noisy_eval]) = (losses(0.0, 1), losses(0.2, 1));
    assert_eq!((quiet, eval), (same, noisy_eval), "nothing is random but the noise of training");
    assert!(noisy != quiet && noisy != other, "{noisy}, {other}, {quiet}");
    assert_eq!(losses(0.2, 1), [noisy, other, noisy_eval]);
}

/// The sequences of the first step in every step.
struct Again(RandomBatches);

impl BatchSource for Again {
    fn micro_batch(&self, _step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        self.0.micro_batch(1, u)
    }
}

/// The iterations sum over all ranks of a micro-batch; an evaluation chooses by score.
#[test]
fn sinkhorn_spreads_the_tokens_of_a_micro_batch() {
    let model = |iterations| ModelConfig {
        moe_router_sinkhorn_iterations: iterations,
        scoring_func: ScoringFunc::Softmax,
        norm_topk_prob: false,
        router_aux_loss_coef: Some(0.0),
        ..tiny_model()
    };
    check(model(Some(20)));
    let run = |iterations| {
        let setup = Setup { micro_batch_size: 8, ..setup(model(iterations), Mapping::default()) };
        let ranks = ThreadWorld::run(1, common::DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 12, micro_batch: 8 };
            let mut trainer = RankTrainer::<f64, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            let eval = trainer.evaluate(2, |u| source.micro_batch(9, u))?;
            Ok::<_, moe_train::Error>((trainer.step(1, &source)?, eval))
        })
        .unwrap_or_else(|error| panic!("{error}"));
        ranks.into_iter().next().unwrap()
    };
    let ((spread, eval), (plain, plain_eval)) = (run(Some(50)), run(None));
    assert_eq!(eval, plain_eval);
    let largest = |report: &moe_train::trainer::StepReport| {
        report.expert_load.iter().flatten().fold(0.0, |max: f64, &load| max.max(load)) * 8.0
    };
    assert!(largest(&spread) < 1.35 && largest(&plain) > 1.5, "{} {}", largest(&spread), largest(&plain));
}

#[test]
fn forced_loads() {
    for forced in [ForcedRouting::Balanced, ForcedRouting::Skewed { exponent: 1.5 }] {
        check_with(tiny_model(), |setup| setup.forced_routing = Some(forced));
        let outcome =
            train(Setup { forced_routing: Some(forced), ..setup(tiny_model(), Mapping::default()) }, 2);
        for report in &outcome.reports {
            for load in &report.expert_load {
                match forced {
                    ForcedRouting::Balanced => assert_eq!(load, &[0.125; 8]),
                    ForcedRouting::Skewed { .. } => {
                        assert!(load[0] > 0.3 && load[0] > 4.0 * load[4], "{load:?}")
                    }
                }
            }
            // What is forced is not what scores would choose.
            assert!((report.aux_loss - 1.0).abs() > 1e-3);
        }
    }
}

fn global(coef: f64) -> Vec<AuxLoss> {
    vec![AuxLoss { scope: AuxLossScope::Global, coef }]
}

/// One rank has four micro-batches and counts them beforehand; where four data-parallel ranks have one each, they add up as
/// they go. With groups the counted choice is not the actual one.
#[test]
fn the_loss_of_the_whole_step() {
    let model = ModelConfig {
        scoring_func: ScoringFunc::Softmax,
        n_group: 4,
        topk_group: 2,
        first_k_dense_replace: 1,
        router_aux_loss_coef: None,
        router_aux_losses: [global(0.07), losses(0.04, 0.03)].concat(),
        ..tiny_model()
    };
    check(model.clone());
    // Several stages per rank, one of them without experts.
    let foldings = [(1, 1, 2, 1, 1), (2, 2, 2, 1, 4), (1, 4, 1, 2, 2), (2, 4, 2, 2, 4)];
    let mappings = foldings.map(|(tp, dp, pp, etp, ep)| {
        (Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() }, AllToAll)
    });
    common::check(&ModelConfig { num_hidden_layers: 4, ..model }, mappings, 2, |setup| {
        setup.global_batch_size = 8;
        let stages = setup.folding.size(Attention::PP);
        let virtual_stages = if setup.folding.size(Attention::DP) == 4 { 1 } else { stages };
        setup.pipeline = PipelineLayout::even(4, stages, virtual_stages).unwrap();
    });
}

/// Choices of all layers, which are on several stages: on one rank each, on one rank alternating, on stages without experts.
#[test]
fn the_loss_over_all_layers() {
    let model = ModelConfig {
        scoring_func: ScoringFunc::Softmax,
        n_group: 4,
        topk_group: 2,
        num_hidden_layers: 5,
        mlp_only_layers: vec![1],
        router_aux_loss_coef: None,
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Model, coef: 0.08 }],
        ..tiny_model()
    };
    check(model.clone());
    let foldings = [(1, 1, 2, 1, 1), (2, 2, 2, 1, 4), (1, 1, 5, 1, 1), (3, 1, 2, 1, 1)];
    let mappings = foldings.map(|(tp, dp, pp, etp, ep)| {
        (Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() }, AllToAll)
    });
    common::check(&model, mappings, 2, |setup| {
        (setup.global_batch_size, setup.micro_batch_size) = (8, 2);
        let stages = setup.folding.size(Attention::PP);
        let virtual_stages = if stages == 2 { 2 } else { 1 };
        setup.pipeline = PipelineLayout::even(5, stages, virtual_stages).unwrap();
    });
}

/// One layer and its choices are all layers': the loss is K times that of its micro-batches.
#[test]
fn a_model_of_one_layer() {
    let run = |scope, coef| {
        let router_aux_losses = vec![AuxLoss { scope, coef }];
        let model = ModelConfig {
            num_hidden_layers: 2,
            mlp_only_layers: vec![0],
            router_aux_loss_coef: None,
            router_aux_losses,
            ..tiny_model()
        };
        let setup = Setup { global_batch_size: 4, micro_batch_size: 2, ..setup(model, Mapping::default()) };
        (train(setup.clone(), 2), setup)
    };
    let ((mut all, setup), (own, _)) = (run(AuxLossScope::Model, 0.04), run(AuxLossScope::MicroBatch, 0.08));
    for report in &mut all.reports {
        report.aux_loss /= 2.0;
    }
    assert_equal(&all, &own, &setup, "one layer");
}

/// With one micro-batch in a step, both scopes are one loss; a pass that counts leaves no trace in what is measured.
#[test]
fn the_step_is_a_large_micro_batch() {
    let run = |losses, micro_batch_size| {
        let model = ModelConfig { router_aux_loss_coef: None, router_aux_losses: losses, ..tiny_model() };
        let setup = Setup { global_batch_size: 4, micro_batch_size, ..setup(model, Mapping::default()) };
        let source = Sequences { micro_batch: micro_batch_size, seq_len: setup.sequence_length };
        (train_on(setup.clone(), 2, source), setup)
    };
    let ((whole, setup), (step, _)) = (run(losses(0.05, 0.0), 4), run(global(0.05), 4));
    assert_equal(&step, &whole, &setup, "one micro-batch");
    // Micro-batches have losses of their own, but the step does not know them.
    let (mut parts, _) = run(global(0.05), 1);
    for (part, whole) in parts.reports.iter_mut().zip(&whole.reports) {
        assert_ne!(part.aux_loss, whole.aux_loss);
        part.aux_loss = whole.aux_loss;
    }
    assert_equal(&parts, &whole, &setup, "four micro-batches");
}

/// The same sequences however they are cut into micro-batches.
struct Sequences {
    micro_batch: usize,
    seq_len: usize,
}

impl BatchSource for Sequences {
    fn micro_batch(&self, step: u64, u: usize) -> moe_train::Result<Vec<Sequence>> {
        let source = RandomBatches { vocab: 37, seq_len: self.seq_len, micro_batch: 1 };
        let sequences =
            (u * self.micro_batch..(u + 1) * self.micro_batch).map(|g| source.micro_batch(step, g));
        Ok(sequences.collect::<Result<Vec<_>, _>>()?.concat())
    }
}

/// Where everything else is in single precision, a router in double precision stands in its own way: what goes in and out
/// of it is converted on every rank.
#[test]
fn routers_in_f64_of_a_model_in_f32() {
    let losses = |dtype, mapping: Mapping| {
        let model = ModelConfig { moe_router_dtype: dtype, router_aux_loss_coef: Some(0.1), ..tiny_model() };
        let mut setup = setup(model, mapping);
        setup.global_batch_size = 8;
        let ranks = ThreadWorld::run(setup.folding.world_size(), common::DEADLINE, move |world| {
            let source = RandomBatches { vocab: 37, seq_len: 12, micro_batch: 1 };
            let mut trainer = RankTrainer::<f32, Cpu>::new(setup.clone(), &world, Cpu::poisoned(1))?;
            (1..=3).map(|step| trainer.step(step, &source)).collect::<moe_train::Result<Vec<_>>>()
        })
        .unwrap_or_else(|error| panic!("{error}"));
        ranks[0].iter().map(|report| (report.total_loss.unwrap(), report.grad_norm)).collect::<Vec<_>>()
    };
    let folded = Mapping { world_size: 4, tp: 2, ep: 4, ..Mapping::default() };
    let reference = losses(Some(RouterDType::F64), Mapping::default());
    assert_ne!(losses(None, Mapping::default()), reference);
    for (other, what) in [
        (losses(Some(RouterDType::F64), folded), "folded"),
        (losses(None, Mapping::default()), "in single precision"),
    ] {
        for ((loss, norm), (want, want_norm)) in other.into_iter().zip(&reference) {
            assert!((loss - want).abs() < 1e-5 * want, "{what}: {loss} and {want}");
            assert!((norm - want_norm).abs() < 1e-4 * want_norm, "{what}: {norm} and {want_norm}");
        }
    }
}

/// With one sequence in a micro-batch, both scopes are one loss.
#[test]
fn scopes_agree_on_micro_batches_of_one_sequence() {
    let run = |micro_batch: f64, sequence: f64| {
        let losses = losses(micro_batch, sequence);
        let model = ModelConfig { router_aux_loss_coef: None, router_aux_losses: losses, ..tiny_model() };
        let setup = setup(model, Mapping::default());
        (train(setup.clone(), 2), setup)
    };
    let ((a, _), (b, setup)) = (run(0.05, 0.0), run(0.0, 0.05));
    assert_equal(&a, &b, &setup, "scopes");
    let (a, _) = run(0.02, 0.03);
    assert_equal(&a, &b, &setup, "both scopes");
}
