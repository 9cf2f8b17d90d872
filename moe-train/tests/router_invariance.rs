//! The mapping never changes what a router computes: sigmoid scores, groups, scaling, losses of several scopes.

mod common;

use common::{assert_equal, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_model::ModelConfig;
use moe_model::config::{AuxLoss, AuxLossScope, ScoringFunc};
use moe_topology::{Attention, Mapping};

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
    model.check().unwrap();
    let foldings = FOLDINGS.map(|((tp, cp, ulysses, dp, pp, etp, ep), dispatcher)| {
        let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
        (mapping.split(Attention::CP_INNER, ulysses), dispatcher)
    });
    common::check(&model, foldings, 2, |setup| (setup.global_batch_size, setup.micro_batch_size) = (8, 2));
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
