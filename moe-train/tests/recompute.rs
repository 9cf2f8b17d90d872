//! What backward makes again is what it would have kept: no bit of a report, a weight or a moment differs.

mod common;

use common::{Outcome, RandomBatches, assert_same_bits, setup, tiny_model, train_in};
use moe_dispatch::DispatcherKind::{self, AllGather, AllToAll};
use moe_dispatch::capacity::DropPolicy;
use moe_kernels::{Backend, Cpu, Float};
use moe_model::RecomputeModule::{self, CoreAttn, Full, Layernorm, Mlp, Moe, MoeAct, SharedExperts};
use moe_model::config::{AuxLoss, AuxLossScope, QkNormScope, ScoringFunc};
use moe_model::{DropUnit, ExpertCapacity, ModelConfig, PipelineLayout, RecomputeModules};
use moe_topology::{Attention, Mapping};
use moe_train::trainer::Setup;

const STEPS: u64 = 2;

/// Each name, and all that go together.
const SETS: [&[RecomputeModule]; 9] = [
    &[Full],
    &[CoreAttn],
    &[Layernorm],
    &[Mlp],
    &[Moe],
    &[MoeAct],
    &[SharedExperts],
    &[CoreAttn, Layernorm, Mlp, MoeAct, SharedExperts],
    &[CoreAttn, Layernorm, Mlp, Moe],
];

/// A dense layer, then layers with experts and a gated shared expert; heads have norms.
fn gated() -> ModelConfig {
    ModelConfig {
        first_k_dense_replace: 1,
        num_hidden_layers: 4,
        shared_expert_intermediate_size: Some(18),
        use_qk_norm: true,
        ..tiny_model()
    }
}

/// The shared expert has no gate; projections have biases and norms over all heads.
fn plain() -> ModelConfig {
    let n_shared_experts = Some(2);
    ModelConfig {
        shared_expert_intermediate_size: None,
        n_shared_experts,
        attention_bias: true,
        qk_norm_scope: QkNormScope::Projection,
        ..gated()
    }
}

/// Latent attention, biases wherever there can be, a router with noise that looks at the whole step.
fn latent() -> ModelConfig {
    ModelConfig {
        num_key_value_heads: 12,
        head_dim: None,
        use_qk_norm: false,
        qk_norm_scope: QkNormScope::Head,
        q_lora_rank: Some(10),
        kv_lora_rank: Some(14),
        qk_nope_head_dim: Some(3),
        qk_rope_head_dim: Some(4),
        v_head_dim: Some(5),
        mlp_bias: true,
        expert_mlp_bias: true,
        scoring_func: ScoringFunc::Sigmoid,
        moe_router_enable_expert_bias: true,
        router_jitter_noise: 0.1,
        router_aux_loss_coef: None,
        router_aux_losses: vec![AuxLoss { scope: AuxLossScope::Global, coef: 0.05 }],
        ..plain()
    }
}

/// `(tp, cp, cp_ulysses, dp, pp, vpp, etp, ep)`.
type Sizes = (usize, usize, usize, usize, usize, usize, usize, usize);

fn case(model: ModelConfig, (tp, cp, ulysses, dp, pp, vpp, etp, ep): Sizes, kind: DispatcherKind) -> Setup {
    let mapping = Mapping { world_size: tp * cp * dp * pp, tp, cp, pp, etp, ep, ..Mapping::default() };
    let pipeline = PipelineLayout::even(model.num_hidden_layers, pp, vpp).unwrap();
    Setup {
        pipeline,
        dispatcher: kind,
        global_batch_size: 8,
        micro_batch_size: 2,
        ..setup(model, mapping.split(Attention::CP_INNER, ulysses))
    }
}

fn run<T: Float>(setup: &Setup, modules: &[RecomputeModule]) -> Outcome
where
    Cpu: Backend<T>,
{
    let recompute = RecomputeModules::new(modules, &setup.model).unwrap();
    let source = RandomBatches {
        vocab: setup.model.vocab_size as u32,
        seq_len: setup.sequence_length,
        micro_batch: setup.micro_batch_size,
    };
    train_in::<T>(Setup { recompute, ..setup.clone() }, STEPS, source)
}

fn check<T: Float>(model: &ModelConfig, sizes: Sizes, kind: DispatcherKind, sets: &[&[RecomputeModule]])
where
    Cpu: Backend<T>,
{
    check_setup::<T>(&case(model.clone(), sizes, kind), sets);
}

fn check_setup<T: Float>(setup: &Setup, sets: &[&[RecomputeModule]])
where
    Cpu: Backend<T>,
{
    let reference = run::<T>(setup, &[]);
    for modules in sets {
        assert_same_bits(
            &run::<T>(setup, modules),
            &reference,
            &format!("{} {modules:?}", setup.folding.mapping()),
        );
    }
}

#[test]
fn each_name_alone_and_all_together() {
    check::<f64>(&gated(), (1, 1, 1, 1, 1, 1, 1, 1), AllToAll, &SETS);
    check::<f32>(&plain(), (2, 1, 1, 1, 2, 1, 2, 1), AllToAll, &SETS);
    check::<f32>(&gated(), (1, 2, 1, 1, 1, 1, 1, 2), AllGather, &SETS);
}

/// Rings, all-to-all, virtual stages, EP beyond DP, ETP above and below TP, three-way axes.
#[test]
fn under_every_kind_of_folding() {
    let together = [SETS[0], SETS[7], SETS[8]];
    for (sizes, kind) in [
        ((2, 1, 1, 2, 1, 1, 1, 4), AllToAll),
        ((1, 1, 1, 4, 1, 1, 4, 1), AllGather),
        ((3, 1, 1, 1, 2, 1, 1, 1), AllToAll),
        ((1, 1, 1, 1, 2, 2, 1, 1), AllToAll),
        ((2, 1, 1, 1, 2, 2, 1, 2), AllGather),
        ((1, 2, 2, 2, 1, 1, 2, 2), AllToAll),
        ((2, 3, 1, 1, 1, 1, 3, 2), AllToAll),
        ((1, 2, 1, 1, 2, 1, 1, 2), AllToAll),
    ] {
        check::<f64>(&gated(), sizes, kind, &together);
        check::<f64>(&plain(), sizes, kind, &together[1..2]);
    }
}

/// What is dropped is decided once, and stays dropped.
#[test]
fn with_latent_attention_biases_and_capacities() {
    let capacity =
        ExpertCapacity { factor: 0.8, policy: DropPolicy::Position, unit: DropUnit::MICRO_BATCH, pad: true };
    for (sizes, kind) in [
        ((2, 1, 1, 1, 1, 1, 1, 2), AllToAll),
        ((1, 2, 1, 1, 2, 1, 2, 1), AllGather),
        ((2, 2, 2, 1, 1, 1, 1, 4), AllToAll),
    ] {
        let setup = Setup { capacity: Some(capacity), ..case(latent(), sizes, kind) };
        check_setup::<f64>(&setup, &[SETS[0], SETS[7], SETS[8]]);
    }
}

/// A shared expert that computes beside transfers computes the same, recomputed or not.
#[test]
fn shared_experts_may_overlap_with_transfers() {
    for (model, sizes, kind) in [
        (gated(), (1, 1, 1, 1, 1, 1, 1, 1), AllToAll),
        (plain(), (2, 1, 1, 2, 1, 1, 1, 4), AllToAll),
        (gated(), (2, 1, 1, 1, 2, 1, 2, 1), AllGather),
        (latent(), (1, 2, 1, 1, 1, 1, 1, 2), AllToAll),
        (gated(), (2, 3, 1, 1, 1, 1, 3, 2), AllToAll),
    ] {
        let setup = case(model, sizes, kind);
        let reference = run::<f32>(&setup, &[]);
        let setup = Setup { moe_shared_expert_overlap: true, ..setup };
        for modules in [&[][..], SETS[0], SETS[6], SETS[7], SETS[8]] {
            let overlapped = run::<f32>(&setup, modules);
            assert_same_bits(&overlapped, &reference, &format!("{} {modules:?}", setup.folding.mapping()));
        }
    }
}
