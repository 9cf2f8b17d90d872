//! An MoE layer with experts of one's own, forward and backward, on two threads that share the experts (EP 2). Its
//! gradients must be those of one rank that holds all experts, and what differences of the objective say.
//!
//! ```text
//! cargo run -p moe-dispatch --example layer
//! ```

use std::time::Duration;

use moe_dispatch::moe_comm::{Comms, ThreadRank, ThreadWorld, World};
use moe_dispatch::moe_kernels::{Cpu, Tensor};
use moe_dispatch::moe_topology::{Expert, Folding, Mapping};
use moe_dispatch::{
    AllToAll, BatchOf, Dispatcher, Error, Grid, ModelUnit, NativeFabric, Router, RouterConfig, RouterInput,
    RouterScales, ScoreFunction,
};

type Fabric<'a> = NativeFabric<'a, f64, Cpu>;

/// Of all ranks together.
const TOKENS: usize = 6;
const HIDDEN: usize = 3;
const NUM_EXPERTS: usize = 4;
const TOP_K: usize = 2;

/// The layer's tokens `[TOKENS, HIDDEN]`, its router's weight `[NUM_EXPERTS, HIDDEN]` and those of its experts
/// `[NUM_EXPERTS, HIDDEN, HIDDEN]`, or the gradients by them.
type Numbers = [Vec<f64>; 3];

/// Rows of the experts of a rank, on the host.
struct Rows {
    x: Vec<f64>,
    probs: Vec<f64>,
    /// The local expert of each row.
    expert: Vec<usize>,
}

impl Rows {
    fn of(device: &Cpu, batch: &BatchOf<Fabric<'_>>) -> Result<Self, Error> {
        let offsets = batch.offsets.to_vec(device)?;
        let rows_of = |(expert, ends): (usize, &[i32])| (ends[0]..ends[1]).map(move |_| expert);
        Ok(Rows {
            x: batch.x.to_vec(device)?,
            probs: batch.probs.to_vec(device)?,
            expert: offsets.windows(2).enumerate().flat_map(rows_of).collect(),
        })
    }
}

/// Our experts: `y_i = p · (Σ_j W_ij x_j)²`. In their place may stand anything that takes rows and gives as many.
struct Experts<'a> {
    /// `[local experts, HIDDEN, HIDDEN]`.
    weight: &'a [f64],
}

impl Experts<'_> {
    /// The rows' `W x`, which backward needs again, and their results.
    fn forward(&self, rows: &Rows) -> (Vec<f64>, Vec<f64>) {
        let mut products = vec![];
        for (x, &expert) in rows.x.chunks(HIDDEN).zip(&rows.expert) {
            let weight = &self.weight[expert * HIDDEN * HIDDEN..][..HIDDEN * HIDDEN];
            products.extend(weight.chunks(HIDDEN).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()));
        }
        let y =
            products.chunks(HIDDEN).zip(&rows.probs).flat_map(|(row, p)| row.iter().map(move |h| p * h * h));
        let y = y.collect();
        (products, y)
    }

    /// The gradients by the rows, their probabilities and the weights.
    fn backward(&self, rows: &Rows, products: &[f64], dy: &[f64]) -> Numbers {
        let (mut dx, mut dprobs) = (vec![0.0; rows.x.len()], vec![0.0; rows.probs.len()]);
        let mut dweight = vec![0.0; self.weight.len()];
        for (row, &expert) in rows.expert.iter().enumerate() {
            for i in 0..HIDDEN {
                let (h, dy) = (products[row * HIDDEN + i], dy[row * HIDDEN + i]);
                dprobs[row] += h * h * dy;
                let dh = 2.0 * rows.probs[row] * h * dy;
                for j in 0..HIDDEN {
                    let at = (expert * HIDDEN + i) * HIDDEN + j;
                    dweight[at] += dh * rows.x[row * HIDDEN + j];
                    dx[row * HIDDEN + j] += dh * self.weight[at];
                }
            }
        }
        [dx, dprobs, dweight]
    }
}

/// The gradient by the layer's output of `Σ upstream ⊙ y`, the objective.
fn upstream() -> Vec<f64> {
    (0..TOKENS * HIDDEN).map(|i| (i as f64).cos()).collect()
}

/// What a rank computes: its part of the objective, and gradients by its tokens, the router and its experts.
fn layer(
    rank: &ThreadRank,
    folding: &Folding,
    [x, router_weight, experts]: &Numbers,
) -> Result<(f64, Numbers), Error> {
    let device = &Cpu::new(1);
    let me = World::<Cpu>::rank(rank);
    let grid = Grid::of(folding, me)?;
    let comms =
        Comms::<Cpu>::builder().expert(Expert::EP).expert(Expert::ETP).expert(Expert::EP | Expert::ETP);
    let comms = comms.build(rank, device, folding)?;
    let fabric = Fabric::new(device, grid, &comms)?;
    let dispatcher = AllToAll { num_experts: NUM_EXPERTS };
    let router = Router::new(RouterConfig {
        num_experts: NUM_EXPERTS,
        top_k: TOP_K,
        scoring: ScoreFunction::SoftmaxPost.into(),
        in_f64: false,
        aux_loss_coef: 0.0,
        sequence_aux_loss_coef: 0.0,
        global_aux_loss_coef: 0.0,
        model_aux_loss_coef: 0.0,
        z_loss_coef: 0.0,
    })?;

    // This rank's tokens and experts.
    let tokens = TOKENS / grid.size();
    let own = |all: &[f64]| {
        Tensor::from_slice(device, tokens, HIDDEN, &all[me * tokens * HIDDEN..][..tokens * HIDDEN])
    };
    let (x, dy) = (own(x)?, own(&upstream())?);
    let router_weight = Tensor::from_slice(device, NUM_EXPERTS, HIDDEN, router_weight)?;
    let local = grid.local_experts(NUM_EXPERTS)?;
    let experts = Experts { weight: &experts[local.start * HIDDEN * HIDDEN..local.end * HIDDEN * HIDDEN] };

    // Forward. Each rank's tokens are a micro-batch of their own, so counts need no sum over ranks.
    let input = || RouterInput::new(&x, router_weight.view());
    let (routing, saved, _) = router.forward(device, input(), None, Ok)?;
    let (batch, state) = dispatcher.dispatch(&fabric, &x, &routing)?;
    let rows = Rows::of(device, &batch)?;
    let (products, out) = experts.forward(&rows);
    let out = Tensor::from_slice(device, batch.rows, HIDDEN, &out)?;
    let y = dispatcher.combine(&fabric, out, &state)?;
    let objective = y.to_vec(device)?.iter().zip(dy.to_vec(device)?).map(|(y, dy)| y * dy).sum();

    // Backward.
    let dout = dispatcher.combine_backward(&fabric, &dy, &state)?.to_vec(device)?;
    let [dx, dprobs, dexperts] = experts.backward(&rows, &products, &dout);
    let dx = Tensor::from_slice(device, batch.rows, HIDDEN, &dx)?;
    let dprobs = Tensor::from_slice(device, 1, batch.rows, &dprobs)?;
    let (mut dx, dweights) = dispatcher.dispatch_backward(&fabric, dx, dprobs, &state)?;
    let mut drouter = Tensor::zeros(device, NUM_EXPERTS, HIDDEN)?;
    let scales = RouterScales {
        micro_batches: grid.size() as u64,
        sequences: grid.size() as u64,
        valid_tokens: TOKENS as u64,
        step_counts: None,
        model_counts: None,
        model_unit: ModelUnit::MicroBatch,
        moe_layers: 1,
    };
    // Adds to what came through the experts.
    router.backward(device, input(), &dweights, saved, dx.view_mut()?, drouter.view_mut()?, scales)?;
    Ok((objective, [dx.to_vec(device)?, drouter.to_vec(device)?, dexperts]))
}

/// The objective and all gradients, by so many ranks.
fn run(ranks: usize, numbers: &Numbers) -> Result<(f64, Numbers), Box<dyn std::error::Error>> {
    let folding = Folding::new(Mapping { world_size: ranks, ep: ranks, ..Mapping::default() })?;
    let numbers = numbers.clone();
    let rank = move |rank: ThreadRank| layer(&rank, &folding, &numbers);
    let mut all = (0.0, [vec![], vec![0.0; NUM_EXPERTS * HIDDEN], vec![]]);
    for (objective, [dx, drouter, dexperts]) in ThreadWorld::run(ranks, Duration::from_secs(20), rank)? {
        all.0 += objective;
        all.1[0].extend(dx);
        // The router is the same on all ranks: its gradient is summed (in training, by an all-reduce).
        all.1[1].iter_mut().zip(drouter).for_each(|(sum, own)| *sum += own);
        all.1[2].extend(dexperts);
    }
    Ok(all)
}

fn assert_close(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{what}: {got}, but should be {want}");
}

/// Runs the layer and holds its gradients against both.
pub fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes = [TOKENS * HIDDEN, NUM_EXPERTS * HIDDEN, NUM_EXPERTS * HIDDEN * HIDDEN];
    let numbers = sizes.map(|n| (0..n).map(|i| (1.7 * (i * i + n) as f64).sin()).collect::<Vec<_>>());
    let (objective, gradients) = run(2, &numbers)?;

    let (of_one_rank, gradients_of_one_rank) = run(1, &numbers)?;
    assert_close("the objective", objective, of_one_rank, 1e-12);
    let step = 1e-5;
    for (which, what) in ["tokens", "router", "experts"].into_iter().enumerate() {
        let mut largest = 0.0f64;
        for i in 0..sizes[which] {
            let got = gradients[which][i];
            assert_close(what, got, gradients_of_one_rank[which][i], 1e-12);
            let moved = |step: f64| {
                let mut numbers = numbers.clone();
                numbers[which][i] += step;
                run(1, &numbers).map(|(objective, _)| objective)
            };
            assert_close(what, got, (moved(step)? - moved(-step)?) / (2.0 * step), 1e-7);
            largest = largest.max(got.abs());
        }
        println!(
            "{what}: {} gradients of at most {largest:.3}, as one rank's and as differences",
            sizes[which]
        );
    }
    Ok(())
}
