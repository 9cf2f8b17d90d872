//! Biases of experts and of dense layers: in f64, any folding gives what one rank gives, and none of them decays.

mod common;

use common::{assert_equal, check, setup, tiny_model, train};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_dispatch::capacity::DropPolicy;
use moe_model::{DropUnit, ExpertCapacity, ModelConfig};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::Setup;

/// `(tp, cp, dp, pp, etp, ep)`; the world is tp·cp·dp·pp.
type Sizes = (usize, usize, usize, usize, usize, usize);

fn mapping((tp, cp, dp, pp, etp, ep): Sizes) -> Mapping {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    mapping.split(Attention::CP_INNER, 1) // a ring
}

fn check_all(model: &ModelConfig, foldings: &[(Sizes, DispatcherKind)], tweak: impl Fn(&mut Setup)) {
    model.check().unwrap();
    check(model, foldings.iter().map(|&(sizes, dispatcher)| (mapping(sizes), dispatcher)), 3, tweak);
}

/// Biases start at 0: it takes two steps until they change what is computed.
#[test]
fn experts() {
    let model = ModelConfig { expert_mlp_bias: true, ..tiny_model() };
    check_all(
        &model,
        &[
            ((2, 1, 1, 1, 2, 1), AllToAll),
            ((1, 1, 2, 1, 2, 1), AllGather),
            ((3, 1, 1, 1, 3, 1), AllToAll),
            ((1, 1, 4, 1, 1, 4), AllToAll),
            ((2, 1, 2, 1, 2, 2), AllGather),
            ((1, 3, 2, 1, 3, 2), AllToAll),
            ((2, 2, 1, 3, 4, 1), AllToAll),
            ((3, 1, 4, 1, 3, 2), AllToAll),
        ],
        |_| (),
    );
}

#[test]
fn dense_layers_shared_experts_and_experts_together() {
    let model = ModelConfig {
        mlp_bias: true,
        expert_mlp_bias: true,
        shared_expert_intermediate_size: Some(18),
        mlp_only_layers: vec![1],
        ..tiny_model()
    };
    check_all(
        &model,
        &[
            ((2, 1, 1, 1, 1, 2), AllToAll),
            ((3, 1, 2, 1, 2, 1), AllToAll),
            ((1, 2, 1, 3, 2, 1), AllGather),
            ((2, 2, 2, 1, 2, 4), AllToAll),
        ],
        |_| (),
    );
    let plain =
        ModelConfig { shared_expert_intermediate_size: None, n_shared_experts: Some(2), ..model.clone() };
    check_all(&plain, &[((3, 1, 1, 1, 3, 1), AllToAll)], |_| ());
}

/// A row without a choice is zero, but for what a bias would make of it.
#[test]
fn rows_that_pad_experts_have_no_part_in_biases() {
    let model = ModelConfig { expert_mlp_bias: true, ..tiny_model() };
    let run = |mapping, pad| {
        let (policy, unit) = (DropPolicy::Probs, DropUnit::MICRO_BATCH);
        let capacity = Some(ExpertCapacity { factor: 0.8, policy, unit, pad });
        train(
            Setup { capacity, global_batch_size: 8, micro_batch_size: 2, ..setup(model.clone(), mapping) },
            3,
        )
    };
    let exact = run(Mapping::default(), false);
    assert!(exact.reports[0].dropped_tokens > 0);
    for sizes in [(1, 1, 1, 1, 1, 1), (2, 1, 1, 1, 2, 1), (1, 2, 2, 1, 2, 2)] {
        let padded = run(mapping(sizes), true);
        assert_equal(&padded, &exact, &setup(model.clone(), Mapping::default()), &format!("{sizes:?}"));
    }
}

#[test]
fn biases_start_at_zero_move_and_do_not_decay() {
    let model =
        ModelConfig { mlp_bias: true, expert_mlp_bias: true, mlp_only_layers: vec![1], ..tiny_model() };
    let run = |weight_decay| {
        let mut setup = setup(model.clone(), Mapping::default());
        setup.optimizer.weight_decay = weight_decay;
        train(setup, 1).state
    };
    // The first step's gradient knows nothing of the decay, so what does not decay is the same after it.
    let (with, without) = (run(0.1), run(0.0));
    for (name, [value, ..]) in &with {
        let same = value == &without[name][0];
        assert_eq!(same, name.ends_with(".bias") || name.contains("norm"), "{name}");
        assert!(!name.ends_with(".bias") || value.iter().any(|x| *x != 0.0), "{name} did not move");
    }
    let biases = with.keys().filter(|name| name.ends_with(".bias")).count();
    assert_eq!(biases, 3 + 2 * 3 * 8, "of a dense layer, and of eight experts of two layers");
}
