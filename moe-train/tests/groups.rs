//! Parameter groups: rates and decays of their own, frozen tensors, under any folding.

mod common;

use common::{Outcome, assert_equal, setup, tiny_model, train};
use moe_model::ModelConfig;
use moe_topology::Mapping;
use moe_train::optim::{ParamGroup, ParamGroups, model_tensors};
use moe_train::trainer::Setup;

fn group(pattern: &str, lr_scale: Option<f64>, weight_decay: Option<f64>, frozen: bool) -> ParamGroup {
    ParamGroup { pattern: pattern.to_owned(), lr_scale, weight_decay, frozen }
}

/// Groups that cut through buckets, ZeRO slices, fused storage (q, k, v; gate and up) and expert parallelism.
fn groups() -> Vec<ParamGroup> {
    vec![
        group("model.embed_tokens.weight", None, None, true),
        group("*.1.self_attn.k_proj.weight", None, None, true),
        group("*.experts.[25].w1.weight", None, None, true),
        group("model.layers.2.input_layernorm.weight", None, None, true),
        group("*.experts.*", Some(0.25), Some(0.0), false),
        group("*.gate.weight", Some(3.0), None, false),
        group("*norm*", Some(0.5), None, false),
        group("*.self_attn.?_proj.weight", None, Some(0.5), false),
        group("lm_head.weight", Some(0.0), None, false),
    ]
}

fn grouped(mapping: Mapping) -> Setup {
    Setup { groups: groups(), global_batch_size: 8, ..setup(tiny_model(), mapping) }
}

/// The first update against the formula, on each tensor with its own rate and decay; frozen tensors stay to the bit and the
/// norm does not count them.
#[test]
fn each_tensor_is_updated_as_its_group_says() {
    let setup = grouped(Mapping::default());
    let (before, after) = (train(setup.clone(), 0), train(setup.clone(), 1));
    let tensors = model_tensors(&setup.model).unwrap();
    let groups = ParamGroups::new(&setup.groups, setup.optimizer.weight_decay, &tensors).unwrap();
    let (lr, norm) = (setup.lr.at(1), after.reports[0].grad_norm);
    let (mut squares, mut frozen) = (0.0, 0);
    for (name, [start, ..]) in &before.state {
        let ([end, m, v], hyper) = (&after.state[name], groups.of(name).unwrap());
        if hyper.frozen {
            frozen += 1;
            assert!(end == start, "{name} moved");
            assert!(m.iter().chain(v).all(|&x| x == 0.0), "{name} has moments");
            continue;
        }
        let moved = end.iter().zip(start).any(|(x, y)| x != y);
        assert_eq!(moved, hyper.lr_scale > 0.0, "{name}");
        for ((&end, &start), &m) in end.iter().zip(start).zip(m) {
            let clipped = m / (1.0 - setup.optimizer.beta1);
            squares += clipped * clipped;
            let step = clipped / (clipped.abs() + setup.optimizer.eps) + hyper.weight_decay * start;
            let expected = start - lr * hyper.lr_scale * step;
            assert!((end - expected).abs() < 1e-12, "{name}: {end} is not {expected}");
        }
    }
    assert_eq!(frozen, 1 + 1 + 2 * 3 + 1);
    let clip = (setup.clip_grad / (norm + 1e-6)).min(1.0);
    assert!((squares.sqrt() - norm * clip).abs() < 1e-12, "{} is not {}", squares.sqrt(), norm * clip);
}

fn assert_moved(outcome: &Outcome) {
    let largest = |name: &str| outcome.state[name][1].iter().fold(0.0, |most: f64, m| most.max(m.abs()));
    assert_eq!(largest("model.embed_tokens.weight"), 0.0);
    assert!(largest("model.layers.0.self_attn.k_proj.weight") > 0.0);
}

/// One matrix in a group of its own, on one stage or on two, and frozen.
#[test]
fn tied_embeddings_are_one_tensor_of_a_group() {
    let tied = |frozen: bool, mapping: Mapping| {
        let model = ModelConfig { tie_word_embeddings: true, ..tiny_model() };
        let (scale, decay) = if frozen { (None, None) } else { (Some(2.0), Some(0.5)) };
        let groups = vec![
            group("model.embed_tokens.weight", scale, decay, frozen),
            group("*.gate.weight", Some(0.5), None, false),
        ];
        Setup { groups, global_batch_size: 8, ..setup(model, mapping) }
    };
    for frozen in [false, true] {
        let one = tied(frozen, Mapping::default());
        let (start, reference) = (train(one.clone(), 0), train(one.clone(), 2));
        let name = "model.embed_tokens.weight";
        assert_eq!(start.state[name] == reference.state[name], frozen);
        for (tp, dp, pp, ep) in [(2, 2, 1, 4), (1, 2, 3, 1), (2, 2, 2, 2), (1, 4, 2, 2)] {
            let mapping = Mapping { world_size: tp * dp * pp, tp, pp, ep, ..Mapping::default() };
            let folded = train(tied(frozen, mapping), 2);
            assert_equal(&folded, &reference, &one, &format!("{:?}, frozen {frozen}", (tp, dp, pp, ep)));
        }
    }
}

#[test]
fn groups_mean_the_same_under_any_folding() {
    let one = grouped(Mapping::default());
    let reference = train(one.clone(), 3);
    assert_moved(&reference);
    for (tp, dp, pp, etp, ep) in
        [(1, 8, 1, 1, 4), (2, 2, 2, 1, 4), (2, 4, 1, 2, 2), (3, 2, 2, 3, 2), (6, 1, 1, 3, 2), (1, 2, 3, 1, 2)]
    {
        let mapping = Mapping { world_size: tp * dp * pp, tp, pp, etp, ep, ..Mapping::default() };
        let folded = train(grouped(mapping), 3);
        assert_equal(&folded, &reference, &one, &format!("{:?}", (tp, dp, pp, etp, ep)));
    }
}
