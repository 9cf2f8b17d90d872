//! The router's gradients by finite differences in f64, and its edges.

use moe_dispatch::{
    Error, Jitter, ModelUnit, Router, RouterConfig, RouterInput, RouterSaved, RouterScales, RouterStats,
    RouterSums, RoutingOn, Sinkhorn,
};
use moe_kernels::family::{ExpertGroups, ScoreFunction, Scoring};
use moe_kernels::random::uniform_pair;
use moe_kernels::{Backend, Cpu, Float, Tensor};
use proptest::prelude::*;

const HIDDEN: usize = 4;
const NUM_EXPERTS: usize = 6;
const STEP_COUNTS: [i64; NUM_EXPERTS] = [9, 0, 21, 7, 4, 17];
const MODEL_COUNTS: [i64; NUM_EXPERTS] = [5, 12, 0, 8, 3, 10];
const MICRO_BATCHES: u64 = 3;
const SEQUENCES: u64 = 7;
const VALID_TOKENS: u64 = 29;

/// What the rest of the step and the other layers chose.
struct Elsewhere {
    step: Tensor<i64, Cpu>,
    model: Tensor<i64, Cpu>,
}

impl Elsewhere {
    fn new() -> Self {
        let counts = |counts: &[i64]| Tensor::from_slice(&Cpu::poisoned(1), 1, counts.len(), counts).unwrap();
        Elsewhere { step: counts(&STEP_COUNTS), model: counts(&MODEL_COUNTS) }
    }

    fn scales(&self) -> RouterScales<'_, Cpu> {
        RouterScales {
            micro_batches: MICRO_BATCHES,
            sequences: SEQUENCES,
            valid_tokens: VALID_TOKENS,
            step_counts: Some(self.step.view()),
            model_counts: Some(self.model.view()),
            model_unit: ModelUnit::MicroBatch,
            moe_layers: 3,
        }
    }
}

/// What a forward pass gives, and the statistics of it alone.
type Seen<T> = (RoutingOn<T, Cpu>, RouterSaved<T, Cpu>, RouterStats);

fn run<T: Float>(
    router: &Router,
    device: &Cpu,
    input: RouterInput<'_, T, Cpu>,
    sum_over_unit: impl FnOnce(Tensor<i64, Cpu>) -> Result<Tensor<i64, Cpu>, Error>,
) -> Result<Seen<T>, Error>
where
    Cpu: Backend<T>,
{
    let mut sums = RouterSums::zeros(device, 1, router.config().num_experts)?;
    let (routing, saved, _) = router.forward(device, input, Some(sums.of(0)?), sum_over_unit)?;
    let stats = sums.read(device)?.remove(0);
    Ok((routing, saved, stats))
}

const SCORES: [ScoreFunction; 7] = [
    ScoreFunction::SoftmaxPost,
    ScoreFunction::SoftmaxPre { normalize: false },
    ScoreFunction::SoftmaxPre { normalize: true },
    ScoreFunction::Sigmoid { normalize: false },
    ScoreFunction::Sigmoid { normalize: true },
    ScoreFunction::SqrtSoftplus { normalize: false },
    ScoreFunction::SqrtSoftplus { normalize: true },
];
const GROUPS: [Option<ExpertGroups>; 3] = [
    None,
    Some(ExpertGroups { count: 3, kept: 2, score_top_k: 2 }),
    Some(ExpertGroups { count: 2, kept: 1, score_top_k: 1 }),
];
const BIAS: [f64; NUM_EXPERTS] = [0.25, -0.5, 0.0, 0.5, -0.25, 0.125];

fn config(scoring: impl Into<Scoring>, top_k: usize) -> RouterConfig {
    RouterConfig {
        num_experts: NUM_EXPERTS,
        top_k,
        scoring: scoring.into(),
        in_f64: false,
        aux_loss_coef: 0.7,
        sequence_aux_loss_coef: 0.4,
        global_aux_loss_coef: 0.9,
        model_aux_loss_coef: 0.6,
        z_loss_coef: 0.2,
    }
}

/// Counts of the micro-batch: this rank's, and those of another one with 5 tokens of each sequence.
fn with_another_rank(counts: Tensor<i64, Cpu>) -> Result<Tensor<i64, Cpu>, Error> {
    let (device, [sequences, width]) = (Cpu::poisoned(1), counts.shape());
    let other = [[4, 0, 3, 1, 1, 1, 5], [0, 2, 2, 2, 2, 2, 5]].concat();
    let own = counts.to_vec(&device)?;
    let sums: Vec<i64> = own.iter().zip(other.into_iter().cycle()).map(|(own, other)| own + other).collect();
    Ok(Tensor::from_slice(&device, sequences, width, &sums)?)
}

fn alone(counts: Tensor<i64, Cpu>) -> Result<Tensor<i64, Cpu>, Error> {
    Ok(counts)
}

fn tensor(rows: usize, cols: usize, values: &[f64]) -> Tensor<f64, Cpu> {
    Tensor::from_f64(&Cpu::poisoned(1), rows, cols, values).unwrap()
}

fn ints(values: &[i32]) -> Tensor<i32, Cpu> {
    Tensor::from_slice(&Cpu::poisoned(1), 1, values.len(), values).unwrap()
}

fn with<'a>(
    x: &'a Tensor<f64, Cpu>,
    weight: &'a Tensor<f64, Cpu>,
    bias: Option<&'a Tensor<f64, Cpu>>,
    sequences: usize,
) -> RouterInput<'a, f64, Cpu> {
    RouterInput { bias: bias.map(Tensor::view), sequences, ..RouterInput::new(x, weight.view()) }
}

/// What a case of the law below has beside tokens and weights.
#[derive(Clone, Copy)]
struct Extras<'a> {
    bias: Option<&'a Tensor<f64, Cpu>>,
    jitter: Option<&'a Tensor<i64, Cpu>>,
    given: Option<&'a Tensor<i32, Cpu>>,
    valid: Option<&'a Tensor<i32, Cpu>>,
    unit: ModelUnit,
}

impl<'a> Extras<'a> {
    fn input(self, x: &'a Tensor<f64, Cpu>, weight: &'a Tensor<f64, Cpu>) -> RouterInput<'a, f64, Cpu> {
        let Extras { bias, jitter, given, valid, .. } = self;
        let jitter = jitter.map(|tokens| Jitter { epsilon: 0.3, key: 77, tokens });
        RouterInput { jitter, given, valid: valid.map(Tensor::view), ..with(x, weight, bias, 2) }
    }

    fn scales(self, elsewhere: &Elsewhere) -> RouterScales<'_, Cpu> {
        RouterScales { model_unit: self.unit, ..elsewhere.scales() }
    }
}

/// `Σ dweights ⊙ weights` plus this rank's part of the five losses, and the choice.
fn objective(
    router: &Router,
    x: &[f64],
    weight: &[f64],
    extras: Extras<'_>,
    dweights: &[f64],
) -> (f64, Vec<i32>) {
    let device = Cpu::poisoned(1);
    let x = tensor(x.len() / HIDDEN, HIDDEN, x);
    let weight = tensor(NUM_EXPERTS, HIDDEN, weight);
    let input = extras.input(&x, &weight);
    let (routing, saved, stats) = run(router, &device, input, with_another_rank).unwrap();
    let main: f64 = routing.weights.to_f64(&device).unwrap().iter().zip(dweights).map(|(w, g)| w * g).sum();
    let RouterConfig {
        aux_loss_coef,
        sequence_aux_loss_coef,
        global_aux_loss_coef,
        model_aux_loss_coef,
        z_loss_coef,
        ..
    } = *router.config();
    let of_step: f64 = STEP_COUNTS.iter().zip(&stats.prob_sums).map(|(&c, p)| c as f64 * p).sum();
    let of_model: f64 = MODEL_COUNTS.iter().zip(&stats.prob_sums).map(|(&c, p)| c as f64 * p).sum();
    // 4 tokens here (3 with padding), 5 of each of two sequences elsewhere, 3 layers.
    let tokens = if extras.valid.is_some() { 13.0 } else { 14.0 };
    let (unit, units) = match extras.unit {
        ModelUnit::MicroBatch => (tokens, MICRO_BATCHES as f64),
        ModelUnit::Step => (29.0, 1.0),
    };
    let model_loss = NUM_EXPERTS as f64 * of_model / (3.0 * unit * 3.0 * unit);
    let (elsewhere, mut sums) = (Elsewhere::new(), RouterSums::zeros(&device, 2, NUM_EXPERTS).unwrap());
    let scales = extras.scales(&elsewhere);
    router.add_model_aux_loss(&device, &saved, scales, sums.of(1).unwrap()).unwrap();
    let model_losses: Vec<f64> = sums.read(&device).unwrap().iter().map(|sum| sum.model_aux_loss).collect();
    assert_eq!(model_losses[0], 0.0);
    assert!((model_losses[1] - model_loss).abs() < 1e-14);
    let divisor = (router.config().top_k * 29 * 29) as f64;
    let objective = main
        + global_aux_loss_coef * NUM_EXPERTS as f64 * of_step / divisor
        + model_aux_loss_coef * model_loss / units
        + aux_loss_coef * stats.aux_loss / MICRO_BATCHES as f64
        + sequence_aux_loss_coef * stats.sequence_aux_loss / SEQUENCES as f64
        + z_loss_coef * stats.z_loss_sum / VALID_TOKENS as f64;
    (objective, routing.experts.to_vec(&device).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn gradients_are_those_of_the_objective(
        x in proptest::collection::vec(-1.0..1.0f64, 4 * HIDDEN),
        weight in proptest::collection::vec(-1.0..1.0f64, NUM_EXPERTS * HIDDEN),
        dweights in proptest::collection::vec(-1.0..1.0f64, 12),
        top_k in 1usize..4,
        function in proptest::sample::select(&SCORES[..]),
        groups in proptest::sample::select(&GROUPS[..]),
        scale in proptest::sample::select(vec![1.0, 2.5]),
        (biased, jittered, forced, padded, of_step) in any::<(bool, bool, bool, bool, bool)>(),
    ) {
        let scoring = Scoring { function, groups, scale };
        let bias = (biased && scoring.function.is_separate()).then_some(&BIAS[..]);
        let router = Router::new(config(scoring, top_k)).unwrap();
        let dweights = &dweights[..4 * top_k];
        let device = Cpu::poisoned(1);
        let bias = bias.map(|bias| tensor(1, NUM_EXPERTS, bias));
        let ids = Tensor::from_slice(&device, 1, 4, &[5i64, 6, 900, 7]).unwrap();
        // Slot k of token i: expert (3i + 2k) mod 5, which differ.
        let given: Vec<i32> = (0..4 * top_k).map(|j| ((3 * (j / top_k) + 2 * (j % top_k)) % 5) as i32).collect();
        let given = Tensor::from_slice(&device, 4, top_k, &given).unwrap();
        let valid = ints(&[1, 0, 1, 1]);
        let extras = Extras {
            bias: bias.as_ref(),
            jitter: jittered.then_some(&ids),
            given: forced.then_some(&given),
            valid: padded.then_some(&valid),
            unit: if of_step { ModelUnit::Step } else { ModelUnit::MicroBatch },
        };
        let (tokens, matrix) = (tensor(4, HIDDEN, &x), tensor(NUM_EXPERTS, HIDDEN, &weight));
        let input = extras.input(&tokens, &matrix);
        let (_, saved, _) = router.forward(&device, input, None, with_another_rank).unwrap();
        // Gradients add to what is there.
        let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[10.0; NUM_EXPERTS * HIDDEN]);
        let mut dx = tensor(4, HIDDEN, &[-3.0; 4 * HIDDEN]);
        let elsewhere = Elsewhere::new();
        router
            .backward(
                &device,
                extras.input(&tokens, &matrix),
                &tensor(1, 4 * top_k, dweights),
                saved,
                dx.view_mut().unwrap(),
                dweight.view_mut().unwrap(),
                extras.scales(&elsewhere),
            )
            .unwrap();
        let (dx, dweight) = (dx.to_f64(&device).unwrap(), dweight.to_f64(&device).unwrap());

        let step = 1e-6;
        let choice = objective(&router, &x, &weight, extras, dweights).1;
        let slope = |moved: &dyn Fn(f64) -> (f64, Vec<i32>)| {
            let ((up, above), (down, below)) = (moved(step), moved(-step));
            // A choice that flips within the step has no slope.
            (above == choice && below == choice).then_some((up - down) / (2.0 * step))
        };
        for i in 0..x.len() {
            let moved = |by| {
                let mut x = x.clone();
                x[i] += by;
                objective(&router, &x, &weight, extras, dweights)
            };
            if let Some(slope) = slope(&moved) {
                prop_assert!((slope - (dx[i] + 3.0)).abs() < 1e-7, "dx[{}]: {} by {}", i, dx[i], slope);
            }
        }
        for i in 0..weight.len() {
            let moved = |by| {
                let mut weight = weight.clone();
                weight[i] += by;
                objective(&router, &x, &weight, extras, dweights)
            };
            if let Some(slope) = slope(&moved) {
                prop_assert!((slope - (dweight[i] - 10.0)).abs() < 1e-7, "dweight[{}]", i);
            }
        }
    }
}

/// Logits are given (the weight is the identity). Group-limited by biased scores, experts 4 and 5 are chosen; the plain
/// best are others, and those the losses count.
#[test]
fn losses_count_the_plain_choice_and_the_load_the_actual_one() {
    let device = Cpu::poisoned(1);
    let groups = Some(ExpertGroups { count: 3, kept: 1, score_top_k: 2 });
    let scoring = Scoring { function: ScoreFunction::Sigmoid { normalize: true }, groups, scale: 2.5 };
    let router = Router::new(config(scoring, 2)).unwrap();
    // Two tokens of two sequences each, sequence-major.
    let logits: [[f64; 6]; 4] = [
        [2.0, -3.0, 1.5, -3.0, 0.5, 0.4],
        [-1.0, 1.0, 0.9, -2.0, 0.3, 0.2],
        [0.1, 0.2, 2.0, -9.0, 0.9, 0.8],
        [3.0, -4.0, -4.0, 2.5, 0.7, 0.9],
    ];
    let bias = [-0.5, -0.5, -0.5, -0.5, 0.0, 0.0];
    let identity: Vec<f64> = (0..36).map(|i| f64::from(u8::from(i % 7 == 0))).collect();
    let (x, weight, bias) = (tensor(4, 6, &logits.concat()), tensor(6, 6, &identity), tensor(1, 6, &bias));
    let (routing, _, stats) = run(&router, &device, with(&x, &weight, Some(&bias), 2), alone).unwrap();
    assert_eq!(routing.experts.to_vec(&device).unwrap(), [4, 5, 4, 5, 4, 5, 5, 4]);
    assert_eq!(stats.expert_counts, [0, 0, 0, 0, 4, 4]);
    assert_eq!(stats.plain_counts, [2, 1, 3, 1, 1, 0]);

    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let weights = routing.weights.to_f64(&device).unwrap();
    for (i, (logits, weights)) in logits.iter().zip(weights.chunks(2)).enumerate() {
        let (a, b) = (sigmoid(logits[4]), sigmoid(logits[5]));
        let (first, second) = if i == 3 { (b, a) } else { (a, b) };
        assert!((weights[0] - 2.5 * first / (a + b)).abs() < 1e-14, "token {i}: {weights:?}");
        assert!((weights[1] - 2.5 * second / (a + b)).abs() < 1e-14, "token {i}: {weights:?}");
    }

    let plain = [[0, 2], [1, 2], [2, 4], [0, 3]];
    let balance = |tokens: &[usize]| {
        let mut sum = 0.0;
        for e in 0..6 {
            let count = tokens.iter().filter(|&&i| plain[i].contains(&e)).count() as f64;
            let share =
                |&i: &usize| sigmoid(logits[i][e]) / logits[i].iter().map(|&x| sigmoid(x)).sum::<f64>();
            sum += count * tokens.iter().map(share).sum::<f64>();
        }
        6.0 * sum / (2.0 * (tokens.len() * tokens.len()) as f64)
    };
    assert!((stats.aux_loss - balance(&[0, 1, 2, 3])).abs() < 1e-14);
    let whole: f64 = stats.plain_counts.iter().zip(&stats.prob_sums).map(|(&c, p)| c as f64 * p).sum();
    assert!((6.0 * whole / (2.0 * 16.0) - stats.aux_loss).abs() < 1e-14);
    assert!((stats.sequence_aux_loss - balance(&[0, 2]) - balance(&[1, 3])).abs() < 1e-14);
}

/// Single precision around double: the same as a router of double precision, but for the rounding of what goes in and out.
#[test]
fn scores_in_f64_of_tokens_in_f32() {
    let device = Cpu::poisoned(1);
    let rounded = |n: usize, step: f64| -> Vec<f64> {
        (0..n).map(|i| f64::from((((i * i) as f64 * step).sin() * 0.8) as f32)).collect()
    };
    let (x, weight) = (rounded(4 * HIDDEN, 0.7), rounded(NUM_EXPERTS * HIDDEN, 1.3));
    let (bias, dweights) = (rounded(NUM_EXPERTS, 2.1), rounded(8, 0.3));
    for function in SCORES {
        let config = RouterConfig { in_f64: true, ..config(function, 2) };
        let router = Router::new(config).unwrap();
        let bias = function.is_separate().then_some(&bias);

        let single =
            |rows, cols, values: &[f64]| Tensor::<f32, Cpu>::from_f64(&device, rows, cols, values).unwrap();
        let (x32, w32) = (single(4, HIDDEN, &x), single(NUM_EXPERTS, HIDDEN, &weight));
        let bias32 = bias.map(|bias| single(1, NUM_EXPERTS, bias));
        let ids = Tensor::from_slice(&device, 1, 4, &[5i64, 6, 900, 7]).unwrap();
        let input = || RouterInput {
            bias: bias32.as_ref().map(Tensor::view),
            sequences: 2,
            jitter: Some(Jitter { epsilon: 0.3, key: 77, tokens: &ids }),
            ..RouterInput::new(&x32, w32.view())
        };
        let (routing, saved, stats) = run(&router, &device, input(), with_another_rank).unwrap();
        let (elsewhere, dweights32) = (Elsewhere::new(), single(1, 8, &dweights));
        let mut dw = single(NUM_EXPERTS, HIDDEN, &[0.5; NUM_EXPERTS * HIDDEN]);
        let mut dx = single(4, HIDDEN, &[0.25; 4 * HIDDEN]);
        let (to, grad) = (dx.view_mut().unwrap(), dw.view_mut().unwrap());
        router.backward(&device, input(), &dweights32, saved, to, grad, elsewhere.scales()).unwrap();

        let (x64, w64) = (tensor(4, HIDDEN, &x), tensor(NUM_EXPERTS, HIDDEN, &weight));
        let bias64 = bias.map(|bias| tensor(1, NUM_EXPERTS, bias));
        let extras = Extras {
            bias: bias64.as_ref(),
            jitter: Some(&ids),
            given: None,
            valid: None,
            unit: ModelUnit::MicroBatch,
        };
        let input = || extras.input(&x64, &w64);
        let (want, saved, wanted) = run(&router, &device, input(), with_another_rank).unwrap();
        let dweights64 = tensor(1, 8, &dweights);
        let mut dw64 = tensor(NUM_EXPERTS, HIDDEN, &[0.0; NUM_EXPERTS * HIDDEN]);
        let mut dx64 = tensor(4, HIDDEN, &[0.0; 4 * HIDDEN]);
        let (to, grad) = (dx64.view_mut().unwrap(), dw64.view_mut().unwrap());
        router.backward(&device, input(), &dweights64, saved, to, grad, elsewhere.scales()).unwrap();

        assert_eq!(stats, wanted, "not a bit of the losses is lost");
        assert_eq!(routing.experts.to_vec(&device).unwrap(), want.experts.to_vec(&device).unwrap());
        let once = |x: &Tensor<f64, Cpu>| -> Vec<f32> {
            x.to_vec(&device).unwrap().into_iter().map(|x| x as f32).collect()
        };
        assert_eq!(routing.weights.to_vec(&device).unwrap(), once(&want.weights), "rounded once");
        for (got, want) in dx.to_vec(&device).unwrap().into_iter().zip(once(&dx64)) {
            assert_eq!(got, 0.25 + want, "rounded, then added");
        }
        for (got, want) in dw.to_vec(&device).unwrap().into_iter().zip(once(&dw64)) {
            assert_eq!(got, 0.5 + want, "rounded, then added");
        }
    }
}

/// Jitter is a product of the tokens, in the accumulation type; a given choice has the weights of the present scores.
#[test]
fn noise_is_on_the_input_and_given_experts_have_present_weights() {
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPre { normalize: false }, 2)).unwrap();
    let values: Vec<f64> = (0..2 * HIDDEN).map(|i| (i as f64).cos()).collect();
    let weight: Vec<f64> = (0..NUM_EXPERTS * HIDDEN).map(|i| (2.0 * i as f64).sin()).collect();
    let (x, weight) = (tensor(2, HIDDEN, &values), tensor(NUM_EXPERTS, HIDDEN, &weight));
    let ids = Tensor::from_slice(&device, 1, 2, &[3i64, 1 << 40]).unwrap();
    let jittered: Vec<f64> = (0..2 * HIDDEN)
        .map(|i| {
            let (token, h) = ([3, 1 << 40][i / HIDDEN], i % HIDDEN);
            values[i] * (0.7 + 0.6 * uniform_pair(77, token, h as u64 / 2)[h % 2])
        })
        .collect();
    let given = Tensor::from_slice(&device, 2, 2, &[5, 0, 3, 2]).unwrap();
    let plain = tensor(2, HIDDEN, &jittered);
    let extras = Extras {
        bias: None,
        jitter: Some(&ids),
        given: Some(&given),
        valid: None,
        unit: ModelUnit::MicroBatch,
    };
    let (got, _, stats) = run(&router, &device, extras.input(&x, &weight), alone).unwrap();
    let extras = Extras { jitter: None, ..extras };
    let (want, _, wanted) = run(&router, &device, extras.input(&plain, &weight), alone).unwrap();
    let weights = |routing: &moe_dispatch::RoutingOn<f64, Cpu>| routing.weights.to_f64(&device).unwrap();
    assert!(weights(&got).iter().zip(weights(&want)).all(|(a, b)| (a - b).abs() < 1e-14));
    assert!((stats.z_loss_sum - wanted.z_loss_sum).abs() < 1e-13);

    assert_eq!(got.experts.to_vec(&device).unwrap(), [5, 0, 3, 2]);
    assert_eq!(stats.expert_counts, [1, 0, 1, 1, 0, 1]);
    let extras = Extras { given: None, ..extras };
    let (own, _, own_stats) = run(&router, &device, extras.input(&plain, &weight), alone).unwrap();
    assert_ne!(own.experts.to_vec(&device).unwrap(), [5, 0, 3, 2]);
    assert_eq!(
        (stats.plain_counts, own_stats.plain_counts),
        (own_stats.expert_counts.clone(), own_stats.expert_counts)
    );
}

/// The iteration as it is written, on the tokens of two ranks; then the choices are even, and weights are the scores'.
#[test]
fn sinkhorn_chooses_as_the_dense_formula_and_spreads_tokens() {
    let device = Cpu::poisoned(1);
    let (tokens, top_k) = (24, 2);
    // All prefer the first experts.
    let logit = |i: usize, e: usize| ((i * 7 + e * 3) as f64).sin() - 1.3 * e as f64;
    let logits: Vec<f64> = (0..tokens * 6).map(|j| logit(j / 6, j % 6)).collect();
    let identity: Vec<f64> = (0..36).map(|i| f64::from(u8::from(i % 7 == 0))).collect();
    let weight = tensor(6, 6, &identity);
    let whole = tensor(tokens, 6, &logits);
    let router = Router::new(config(ScoreFunction::SoftmaxPre { normalize: false }, top_k)).unwrap();
    let own = |numbers: &[f64]| Ok(numbers.to_vec());
    for iterations in [1, 2, 5, 60] {
        let mut d = [1.0; 6];
        let x = |i: usize, e: usize| logit(i, e).exp();
        for _ in 0..iterations {
            let r: Vec<f64> = (0..tokens)
                .map(|i| 1.0 / (tokens as f64 * (0..6).map(|e| d[e] * x(i, e)).sum::<f64>()))
                .collect();
            d = std::array::from_fn(|e| 1.0 / (6.0 * (0..tokens).map(|i| r[i] * x(i, e)).sum::<f64>()));
        }
        let want: Vec<i32> = (0..tokens)
            .flat_map(|i| {
                let mut order: Vec<usize> = (0..6).collect();
                order.sort_by(|&a, &b| (d[b] * x(i, b)).total_cmp(&(d[a] * x(i, a))));
                order.into_iter().take(top_k).map(|e| e as i32)
            })
            .collect();
        let sinkhorn = Some(Sinkhorn { iterations, sum_over_unit: &own });
        let mut sums = RouterSums::zeros(&device, 1, 6).unwrap();
        let input = RouterInput { sinkhorn, margins: true, ..RouterInput::new(&whole, weight.view()) };
        let (routing, _, margins) = router.forward(&device, input, Some(sums.of(0).unwrap()), alone).unwrap();
        let stats = sums.read(&device).unwrap().remove(0);
        // The plan's scores as logarithms, and the choice that would be counted.
        let gap = |score: &dyn Fn(usize) -> f64| {
            let mut scores: Vec<f64> = (0..6).map(score).collect();
            scores.sort_by(|a, b| b.total_cmp(a));
            scores[top_k - 1] - scores[top_k]
        };
        assert_eq!(margins.as_ref().map(Vec::len), Some(tokens));
        for (i, margin) in margins.iter().flatten().enumerate() {
            let want = gap(&|e| (d[e] * x(i, e)).ln()).min(gap(&|e| logit(i, e)));
            assert!((margin - want).abs() < 1e-12, "margin {margin} of token {i}, and {want}");
        }
        assert_eq!(routing.experts.to_vec(&device).unwrap(), want, "{iterations} iterations");
        let weights = routing.weights.to_f64(&device).unwrap();
        for (j, (w, e)) in weights.iter().zip(&want).enumerate() {
            let i = j / top_k;
            let p = x(i, *e as usize) / (0..6).map(|e| x(i, e)).sum::<f64>();
            assert!((w - p).abs() < 1e-14, "weights are those of the scores");
        }
        if iterations == 60 {
            assert_eq!(stats.plain_counts[4..], [0, 0]);
            assert!(stats.expert_counts.iter().all(|count| (6..=12).contains(count)), "{stats:?}");
        }
    }
    // One token, alone or beside padding, has nobody to be balanced with: it chooses by score.
    for padded in [false, true] {
        let lone = tensor(2, 6, &[&[0.1, 0.5, -0.2, 0.7, 0.3, 0.6], &[f64::NAN; 6][..]].concat());
        let lone = if padded { lone } else { tensor(1, 6, &lone.to_f64(&device).unwrap()[..6]) };
        let valid = Tensor::from_slice(&device, 1, 2, &[1, 0]).unwrap();
        let sinkhorn = Some(Sinkhorn { iterations: 5, sum_over_unit: &own });
        let valid = padded.then(|| valid.view());
        let input = RouterInput { sinkhorn, valid, ..RouterInput::new(&lone, weight.view()) };
        let (routing, _, _) = run(&router, &device, input, alone).unwrap();
        assert_eq!(routing.experts.to_vec(&device).unwrap()[..top_k], [3, 5]);
    }
    // Without tokens it still takes part; a choice that is given needs no iteration.
    let calls = std::cell::Cell::new(0);
    let counted = |numbers: &[f64]| {
        calls.set(calls.get() + 1);
        Ok(numbers.to_vec())
    };
    let sinkhorn = Some(Sinkhorn { iterations: 3, sum_over_unit: &counted });
    let none = tensor(0, 6, &[]);
    let input = RouterInput { sinkhorn, ..RouterInput::new(&none, weight.view()) };
    router.forward(&device, input, None, alone).unwrap();
    assert_eq!(calls.get(), 3);
}

/// Two logits that are one number in single precision.
#[test]
fn near_ties_are_told_apart_in_f64() {
    let device = Cpu::poisoned(1);
    let x = Tensor::<f32, Cpu>::from_f64(&device, 1, 2, &[1.0, 2f64.powi(-30)]).unwrap();
    let weight = Tensor::<f32, Cpu>::from_f64(&device, 2, 2, &[1.0, 0.0, 1.0, 1.0]).unwrap();
    for (in_f64, chosen) in [(false, 0), (true, 1)] {
        let config = RouterConfig { num_experts: 2, in_f64, ..config(ScoreFunction::SoftmaxPost, 1) };
        let input = RouterInput::new(&x, weight.view());
        let (routing, _, _) = run(&Router::new(config).unwrap(), &device, input, alone).unwrap();
        assert_eq!(routing.experts.to_vec(&device).unwrap(), [chosen]);
    }
}

/// Sequences of 3, 0 and 2 valid tokens among 3 positions each: losses, counts and choices are those of the valid tokens alone.
#[test]
fn padding_is_no_token() {
    let device = Cpu::poisoned(1);
    let element = |i: usize| ((i * i + 3 * i) as f64 * 0.37).sin();
    let x: Vec<f64> = (0..9 * HIDDEN).map(element).collect();
    let weight: Vec<f64> = (0..NUM_EXPERTS * HIDDEN).map(|i| element(i + 50)).collect();
    let weight = tensor(NUM_EXPERTS, HIDDEN, &weight);
    let valid = [1, 0, 1, 1, 0, 1, 1, 0, 0];
    let rows = |keep: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let kept = (0..9).filter(|&i| valid[i] == 1 && keep(i));
        kept.flat_map(|i| x[i * HIDDEN..(i + 1) * HIDDEN].to_vec()).collect()
    };
    for function in SCORES {
        let router = Router::new(config(function, 2)).unwrap();
        let run = |x: &[f64], valid: Option<&[i32]>, sequences: usize| {
            let (x, valid) = (tensor(x.len() / HIDDEN, HIDDEN, x), valid.map(ints));
            let valid = valid.as_ref().map(Tensor::view);
            let input = RouterInput { valid, ..with(&x, &weight, None, sequences) };
            let (routing, _, stats) = run(&router, &device, input, alone).unwrap();
            (routing.experts.to_vec(&device).unwrap(), routing.weights.to_vec(&device).unwrap(), stats)
        };
        let (experts, weights, padded) = run(&x, Some(&valid), 3);
        let (own_experts, own_weights, compact) = run(&rows(&|_| true), None, 1);
        let valid_choice = |i: &usize| valid[i / 2] == 1;
        let of_valid = (0..18).filter(valid_choice).map(|i| (experts[i], weights[i]));
        assert!(of_valid.eq(own_experts.into_iter().zip(own_weights)), "{function:?}");
        assert!((0..18).filter(|i| !valid_choice(i)).all(|i| (experts[i], weights[i]) == (-1, 0.0)));

        assert_eq!(padded.expert_counts, compact.expert_counts);
        assert_eq!(padded.plain_counts, compact.plain_counts);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-13, "{function:?}: {a} and {b}");
        padded.prob_sums.iter().zip(&compact.prob_sums).for_each(|(&a, &b)| close(a, b));
        close(padded.aux_loss, compact.aux_loss);
        close(padded.z_loss_sum, compact.z_loss_sum);
        let sequences = [0, 2].map(|b| run(&rows(&|i| i % 3 == b), None, 1).2.aux_loss);
        close(padded.sequence_aux_loss, sequences.iter().sum());
    }
}

/// A rank whose tokens are all padding, in a step without any other: there is nothing, and nothing is divided by it.
#[test]
fn padding_only() {
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPost, 2)).unwrap();
    let weight = tensor(NUM_EXPERTS, HIDDEN, &[0.1; NUM_EXPERTS * HIDDEN]);
    let (x, valid) = (tensor(2, HIDDEN, &[0.5; 2 * HIDDEN]), ints(&[0, 0]));
    let input = RouterInput { valid: Some(valid.view()), ..RouterInput::new(&x, weight.view()) };
    let (_, saved, stats) = run(&router, &device, input, alone).unwrap();
    assert_eq!(stats.expert_counts, [0; NUM_EXPERTS]);
    assert_eq!((stats.aux_loss, stats.sequence_aux_loss, stats.z_loss_sum), (0.0, 0.0, 0.0));
    let elsewhere = Elsewhere::new();
    let none = Tensor::zeros(&device, 1, NUM_EXPERTS).unwrap();
    let scales = RouterScales { valid_tokens: 0, step_counts: Some(none.view()), ..elsewhere.scales() };
    let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[1.0; NUM_EXPERTS * HIDDEN]);
    let dweights = tensor(1, 4, &[0.0; 4]);
    let (input, grad) = (RouterInput::new(&x, weight.view()), dweight.view_mut().unwrap());
    let mut dx = tensor(2, HIDDEN, &[2.0; 2 * HIDDEN]);
    router.backward(&device, input, &dweights, saved, dx.view_mut().unwrap(), grad, scales).unwrap();
    assert_eq!(dx.to_vec(&device).unwrap(), [2.0; 2 * HIDDEN]);
    assert_eq!(dweight.to_vec(&device).unwrap(), [1.0; NUM_EXPERTS * HIDDEN]);
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
        let (routing, _, stats) = run(&router, &device, RouterInput::new(&x, weight.view()), alone).unwrap();
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
    let (routing, _, stats) = run(&router, &device, RouterInput::new(&x, weight.view()), alone).unwrap();
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
    let x = tensor(3, HIDDEN, &x);
    let error = run(&router, &device, RouterInput::new(&x, weight.view()), alone).unwrap_err();
    assert!(matches!(error, Error::Device(moe_kernels::Error::NotANumber { row: 2, .. })), "{error}");
}

#[test]
fn no_tokens() {
    let device = Cpu::poisoned(1);
    let router = Router::new(config(ScoreFunction::SoftmaxPost, 2)).unwrap();
    let weight = tensor(NUM_EXPERTS, HIDDEN, &[0.1; NUM_EXPERTS * HIDDEN]);
    let mut summed = 0;
    let count = |counts: Tensor<i64, Cpu>| {
        summed += 1;
        alone(counts)
    };
    let x = tensor(0, HIDDEN, &[]);
    let (routing, saved, stats) = run(&router, &device, RouterInput::new(&x, weight.view()), count).unwrap();
    assert_eq!((summed, routing.tokens, stats.aux_loss, stats.z_loss_sum), (1, 0, 0.0, 0.0));
    let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[0.0; NUM_EXPERTS * HIDDEN]);
    let (input, elsewhere, mut dx) =
        (RouterInput::new(&x, weight.view()), Elsewhere::new(), tensor(0, HIDDEN, &[]));
    let (to, grad) = (dx.view_mut().unwrap(), dweight.view_mut().unwrap());
    router.backward(&device, input, &tensor(1, 0, &[]), saved, to, grad, elsewhere.scales()).unwrap();
    assert_eq!(dweight.to_f64(&device).unwrap(), [0.0; NUM_EXPERTS * HIDDEN]);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |config: RouterConfig| assert!(matches!(Router::new(config), Err(Error::Router { .. })));
    let good = config(ScoreFunction::SoftmaxPost, 2);
    refused(RouterConfig { top_k: 0, ..good });
    refused(RouterConfig { top_k: NUM_EXPERTS + 1, ..good });
    refused(RouterConfig { z_loss_coef: f64::NAN, ..good });
    refused(RouterConfig { sequence_aux_loss_coef: f64::INFINITY, ..good });
    refused(RouterConfig { global_aux_loss_coef: f64::NAN, ..good });
    for (count, kept, score_top_k) in
        [(0, 1, 1), (4, 2, 1), (3, 0, 1), (6, 1, 1), (3, 4, 1), (3, 2, 0), (3, 2, 3)]
    {
        let groups = Some(ExpertGroups { count, kept, score_top_k });
        refused(config(Scoring { groups, ..ScoreFunction::SoftmaxPost.into() }, 2));
    }

    let device = Cpu::poisoned(1);
    let router = Router::new(good).unwrap();
    let (x, weight) = (tensor(1, HIDDEN, &[1.0; HIDDEN]), tensor(NUM_EXPERTS, HIDDEN, &[0.1; 24]));
    let short = |counts: Tensor<i64, Cpu>| Ok(counts.columns(1..NUM_EXPERTS)?);
    let short = run(&router, &device, RouterInput::new(&x, weight.view()), short);
    assert!(matches!(short, Err(Error::Router { .. })));
    for sequences in [0, 2] {
        let uneven = run(&router, &device, with(&x, &weight, None, sequences), alone);
        assert!(matches!(uneven, Err(Error::Router { .. })), "{sequences} sequences of one token");
    }
    let elsewhere = Elsewhere::new();
    let few = elsewhere.model.columns(0..1).unwrap();
    for scales in [
        RouterScales { valid_tokens: 0, ..elsewhere.scales() },
        RouterScales { step_counts: None, ..elsewhere.scales() },
        RouterScales { model_counts: Some(few.view()), ..elsewhere.scales() },
    ] {
        let input = || RouterInput::new(&x, weight.view());
        let (_, saved, _) = run(&router, &device, input(), alone).unwrap();
        let mut dweight = tensor(NUM_EXPERTS, HIDDEN, &[0.0; 24]);
        let (dweights, mut dx) = (tensor(1, 2, &[1.0, 1.0]), tensor(1, HIDDEN, &[0.0; HIDDEN]));
        let (to, grad) = (dx.view_mut().unwrap(), dweight.view_mut().unwrap());
        let refused = router.backward(&device, input(), &dweights, saved, to, grad, scales);
        assert!(matches!(refused, Err(Error::Router { .. })), "{scales:?}");
    }
}
