//! Trains a three-layer network on plain `Vec<f32>`, one layer per thread, under 1F1B over channels.
//!
//! `cargo run --example threads -p moe-pipeline`

use std::convert::Infallible;
use std::thread;
use std::time::Duration;

use moe_pipeline::{Program, Stage, execute, generate, lower, transport, validate};

const RANKS: u32 = 3;
const MICROBATCHES: u32 = 8;
const STEPS: usize = 300;
const WIDTH: usize = 4;

/// A layer `y = tanh(W x)`. It holds no state: weights, gradients and data are the rank's.
struct Layer {
    first: bool,
    last: bool,
}

/// What a rank lends to its layer.
struct Rank {
    weights: Vec<f32>,
    grads: Vec<f32>,
    loss: f32,
}

fn sample(m: u32) -> (Vec<f32>, Vec<f32>) {
    let x: Vec<f32> = (0..WIDTH).map(|i| (m as f32 + 1.7 * i as f32).sin()).collect();
    let target = (0..WIDTH).map(|i| 0.8 * x[i] * x[(i + 1) % WIDTH]).collect();
    (x, target)
}

impl Stage for Layer {
    type Cx = Rank;
    type Act = Vec<f32>;
    type Saved = (Vec<f32>, Vec<f32>);
    type Deferred = (Vec<f32>, Vec<f32>);
    type Error = Infallible;

    fn forward(
        &self,
        m: u32,
        x: Option<Vec<f32>>,
        cx: &mut Rank,
    ) -> Result<(Option<Vec<f32>>, Self::Saved), Infallible> {
        let x = x.unwrap_or_else(|| sample(m).0);
        let dot = |row: &[f32]| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f32>();
        let y: Vec<f32> = cx.weights.chunks(WIDTH).map(|row| dot(row).tanh()).collect();
        if self.last {
            cx.loss += y.iter().zip(sample(m).1).map(|(y, t)| (y - t).powi(2) / 2.0).sum::<f32>();
        }
        Ok(((!self.last).then(|| y.clone()), (x, y)))
    }

    fn backward_input(
        &self,
        m: u32,
        dy: Option<Vec<f32>>,
        (x, y): Self::Saved,
        cx: &mut Rank,
    ) -> Result<(Option<Vec<f32>>, Self::Deferred), Infallible> {
        let dy = dy.unwrap_or_else(|| y.iter().zip(sample(m).1).map(|(y, t)| y - t).collect());
        let dz: Vec<f32> = dy.iter().zip(&y).map(|(dy, y)| dy * (1.0 - y * y)).collect();
        let dx = (0..WIDTH).map(|j| (0..WIDTH).map(|i| cx.weights[i * WIDTH + j] * dz[i]).sum()).collect();
        Ok(((!self.first).then_some(dx), (x, dz)))
    }

    fn backward_weight(&self, _: u32, (x, dz): Self::Deferred, cx: &mut Rank) -> Result<(), Infallible> {
        for (row, dz) in cx.grads.chunks_mut(WIDTH).zip(dz) {
            row.iter_mut().zip(&x).for_each(|(g, x)| *g += dz * x);
        }
        Ok(())
    }
}

/// All steps of one rank.
fn train(program: &Program, rank: u32, mut channels: transport::Channels<Vec<f32>>) -> Result<(), String> {
    let stages = [Layer { first: rank == 0, last: rank + 1 == RANKS }];
    let weights = (0..WIDTH * WIDTH).map(|i| (i as f32 * 2.3 + rank as f32).cos() / 2.0).collect();
    let mut cx = Rank { weights, grads: Vec::new(), loss: 0.0 };
    for step in 0..STEPS {
        cx.grads = vec![0.0; WIDTH * WIDTH];
        cx.loss = 0.0;
        execute(program, rank, &stages, &mut channels, &mut cx).map_err(|error| error.to_string())?;
        cx.weights.iter_mut().zip(&cx.grads).for_each(|(w, g)| *w -= 0.1 * g);
        if stages[0].last && (step % 50 == 0 || step + 1 == STEPS) {
            println!("step {step:3}  loss {:.4}", cx.loss / MICROBATCHES as f32);
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let schedule = generate::one_f_one_b(RANKS, MICROBATCHES)?;
    print!("{schedule}");
    let program = validate(lower(&schedule)?, Some(RANKS))?;
    let channels = transport::rendezvous(RANKS, Duration::from_secs(10));
    thread::scope(|scope| {
        let start = |(rank, channels)| {
            let program = &program;
            scope.spawn(move || train(program, rank, channels))
        };
        let ranks: Vec<_> = (0..).zip(channels).map(start).collect();
        ranks.into_iter().try_for_each(|rank| rank.join().map_err(|_| "a rank panicked".to_owned())?)
    })?;
    Ok(())
}
