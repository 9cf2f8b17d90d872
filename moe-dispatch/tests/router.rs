//! The router's gradients by finite differences in f64, and its edges.

use moe_dispatch::{Error, Router, RouterConfig, RouterScales};
use moe_kernels::family::ScoreFunction;
use moe_kernels::{Cpu, Tensor};
use proptest::prelude::*;

const HIDDEN: usize = 4;
const NUM_EXPERTS: usize = 6;
const SCALES: RouterScales = RouterScales { micro_batches: 3, valid_tokens: 29 };
const SCORES: [ScoreFunction; 3] = [
    ScoreFunction::SoftmaxPost,
    ScoreFunction::SoftmaxPre { normalize: false },
    ScoreFunction::SoftmaxPre { normalize: true },
];

fn config(score: ScoreFunction, top_k: usize) -> RouterConfig {
    RouterConfig { num_experts: NUM_EXPERTS, top_k, score, aux_loss_coef: 0.7, z_loss_coef: 0.2 }
}

/// Counts of the micro-batch: this rank's, and those of another one with 5 tokens.
fn with_another_rank(counts: &[i64]) -> Result<Vec<i64>, Error> {
    Ok(counts.iter().zip([4, 0, 3, 1, 1, 1, 5]).map(|(own, other)| own + other).collect())
}

fn alone(counts: &[i64]) -> Result<Vec<i64>, Error> {
    Ok(counts.to_vec())
}

fn tensor(rows: usize, cols: usize, values: &[f64]) -> Tensor<f64, Cpu> {
    Tensor::from_f64(&Cpu::poisoned(1), rows, cols, values).unwrap()
}

/// `Σ dweights ⊙ weights` plus this rank's part of the two losses.
fn objective(router: &Router, x: &[f64], weight: &[f64], dweights: &[f64]) -> f64 {
    let device = Cpu::poisoned(1);
    let x = tensor(x.len() / HIDDEN, HIDDEN, x);
    let weight = tensor(NUM_EXPERTS, HIDDEN, weight);
    let (routing, _, stats) = router.forward(&device, &x, weight.view(), with_another_rank).unwrap();
    let main: f64 = routing.weights.to_f64(&device).unwrap().iter().zip(dweights).map(|(w, g)| w * g).sum();
    let RouterConfig { aux_loss_coef, z_loss_coef, .. } = *router.config();
    main + aux_loss_coef * stats.aux_loss / SCALES.micro_batches as f64
        + z_loss_coef * stats.z_loss_sum / SCALES.valid_tokens as f64
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn gradients_are_those_of_the_objective(
        x in proptest::collection::vec(-1.0..1.0f64, 3 * HIDDEN),
        weight in proptest::collection::vec(-1.0..1.0f64, NUM_EXPERTS * HIDDEN),
        dweights in proptest::collection::vec(-1.0..1.0f64, 9),
        top_k in 1usize..4,
        score in proptest::sample::select(&SCORES[..]),
    ) {
        let router = Router::new(config(score, top_k)).unwrap();
        let dweights = &dweights[..3 * top_k];
        let device = Cpu::poisoned(1);
        let (_, saved, _) = router
            .forward(&device, &tensor(3, HIDDEN, &x), tensor(NUM_EXPERTS, HIDDEN, &weight).view(), with_another_rank)
            .unwrap();
        // Gradients add to what is there.
        let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[10.0; NUM_EXPERTS * HIDDEN]);
        let dx = router
            .backward(
                &device,
                &tensor(1, 3 * top_k, dweights),
                saved,
                tensor(NUM_EXPERTS, HIDDEN, &weight).view(),
                dweight.view_mut().unwrap(),
                SCALES,
            )
            .unwrap();
        let (dx, dweight) = (dx.to_f64(&device).unwrap(), dweight.to_f64(&device).unwrap());

        let step = 1e-6;
        let slope = |moved: &dyn Fn(f64) -> f64| (moved(step) - moved(-step)) / (2.0 * step);
        for i in 0..x.len() {
            let moved = |by| {
                let mut x = x.clone();
                x[i] += by;
                objective(&router, &x, &weight, dweights)
            };
            prop_assert!((slope(&moved) - dx[i]).abs() < 1e-7, "dx[{}]: {} by {}", i, dx[i], slope(&moved));
        }
        for i in 0..weight.len() {
            let moved = |by| {
                let mut weight = weight.clone();
                weight[i] += by;
                objective(&router, &x, &weight, dweights)
            };
            prop_assert!((slope(&moved) - (dweight[i] - 10.0)).abs() < 1e-7, "dweight[{}]", i);
        }
    }
}

#[test]
fn ties_go_to_the_smaller_expert() {
    let device = Cpu::poisoned(1);
    // Logits 0, 1, 1, 0, 1, 0.
    let mut weight = [0.0; NUM_EXPERTS * HIDDEN];
    for expert in [1, 2, 4] {
        weight[expert * HIDDEN] = 1.0;
    }
    let weight = tensor(NUM_EXPERTS, HIDDEN, &weight);
    for score in SCORES {
        let router = Router::new(config(score, 4)).unwrap();
        let x = tensor(1, HIDDEN, &[1.0; HIDDEN]);
        let (routing, _, stats) = router.forward(&device, &x, weight.view(), alone).unwrap();
        assert_eq!(routing.experts.to_vec(&device).unwrap(), [1, 2, 4, 0]);
        assert_eq!(stats.expert_counts, [1, 1, 1, 0, 1, 0]);
    }
}

#[test]
fn a_balanced_routing_costs_one() {
    // Token i chooses experts i and i + 1 (mod 6) and has the probabilities of a circulant matrix.
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPost, 2)).unwrap();
    let mut logits = [0.0; 36];
    for i in 0..6 {
        logits[i * 6 + i] = 2.0;
        logits[i * 6 + (i + 1) % 6] = 1.0;
    }
    let identity: Vec<f64> = (0..36).map(|i| f64::from(u8::from(i % 7 == 0))).collect();
    // x · identityᵀ = logits
    let (x, weight) = (tensor(6, 6, &logits), tensor(6, 6, &identity));
    let (routing, _, stats) = router.forward(&device, &x, weight.view(), alone).unwrap();
    assert_eq!(routing.experts.to_vec(&device).unwrap(), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0]);
    assert!((stats.aux_loss - 1.0).abs() < 1e-14, "{}", stats.aux_loss);
    let lse = (2f64.exp() + 1f64.exp() + 4.0).ln();
    assert!((stats.z_loss_sum - 6.0 * lse * lse).abs() < 1e-12);
}

#[test]
fn a_token_that_is_no_number_is_named() {
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPost, 2)).unwrap();
    let mut x = [0.5; 3 * HIDDEN];
    x[2 * HIDDEN + 1] = f64::NAN;
    let weight = tensor(NUM_EXPERTS, HIDDEN, &[0.1; NUM_EXPERTS * HIDDEN]);
    let error = router.forward(&device, &tensor(3, HIDDEN, &x), weight.view(), alone).unwrap_err();
    assert!(matches!(error, Error::Device(moe_kernels::Error::NotANumber { row: 2, .. })), "{error}");
}

#[test]
fn no_tokens() {
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPost, 2)).unwrap();
    let weight = tensor(NUM_EXPERTS, HIDDEN, &[0.1; NUM_EXPERTS * HIDDEN]);
    let mut summed = 0;
    let count = |counts: &[i64]| {
        summed += 1;
        alone(counts)
    };
    let (routing, saved, stats) =
        router.forward(&device, &tensor(0, HIDDEN, &[]), weight.view(), count).unwrap();
    assert_eq!((summed, routing.tokens, stats.aux_loss, stats.z_loss_sum), (1, 0, 0.0, 0.0));
    let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[0.0; NUM_EXPERTS * HIDDEN]);
    let dx = router
        .backward(&device, &tensor(1, 0, &[]), saved, weight.view(), dweight.view_mut().unwrap(), SCALES)
        .unwrap();
    assert_eq!(dx.shape(), [0, HIDDEN]);
    assert_eq!(dweight.to_f64(&device).unwrap(), [0.0; NUM_EXPERTS * HIDDEN]);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |config: RouterConfig| assert!(matches!(Router::new(config), Err(Error::Router { .. })));
    let good = config(ScoreFunction::SoftmaxPost, 2);
    refused(RouterConfig { top_k: 0, ..good });
    refused(RouterConfig { top_k: NUM_EXPERTS + 1, ..good });
    refused(RouterConfig { z_loss_coef: f64::NAN, ..good });

    let device = Cpu::poisoned(1);
    let router = Router::new(good).unwrap();
    let (x, weight) = (tensor(1, HIDDEN, &[1.0; HIDDEN]), tensor(NUM_EXPERTS, HIDDEN, &[0.1; 24]));
    let short = |counts: &[i64]| Ok(counts[1..].to_vec());
    assert!(matches!(router.forward(&device, &x, weight.view(), short), Err(Error::Router { .. })));
    let (_, saved, _) = router.forward(&device, &x, weight.view(), alone).unwrap();
    let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[0.0; 24]);
    let scales = RouterScales { valid_tokens: 0, ..SCALES };
    let dweights = tensor(1, 2, &[1.0, 1.0]);
    let refused =
        router.backward(&device, &dweights, saved, weight.view(), dweight.view_mut().unwrap(), scales);
    assert!(matches!(refused, Err(Error::Router { .. })));
}
