//! The head beside itself in f64 on the host, and beside a second run.

use moe_kernels::{Backend, Cpu, Cuda, Float, Tensor, bf16};

use crate::Error;
use crate::model::{self, HeadModel, Shape};

/// Several chunks of tokens, of which the last is shorter; tokens and words that are no multiples of any tile.
const SHAPE: Shape = Shape { name: "check", hidden: 64, vocab: 151_936, tokens: 2501 };

/// The largest error of a result by its norm. Rounding to bf16 moves a number by 2⁻⁹ of it at most, and five roundings lie between
/// the input and its gradient.
const TOLERANCE: f64 = 0.01;

/// # Errors
/// A result differs by more than rounding explains, or two runs differ in a bit.
pub fn run() -> Result<(), Error> {
    // Memory is poisoned: what is read before it is written shows.
    let (gpu, cpu) = (Cuda::poisoned(0)?, Cpu::new(8));
    let x = model::input::<bf16, _>(&gpu, &SHAPE)?;
    let mut ours = HeadModel::<bf16, Cuda>::new(gpu.clone(), &SHAPE)?;
    let first = outcome(&mut ours, &x)?;
    if outcome(&mut ours, &x)? != first {
        return Err("two runs of the head differ".into());
    }
    let mut reference = HeadModel::<f64, Cpu>::new(cpu.clone(), &SHAPE)?;
    for bucket in 0..ours.cx.params.buckets().len() {
        let weights = ours.cx.params.weights(bucket)?.to_f64(&gpu)?;
        reference.cx.params.weights_mut(bucket)?.upload(&cpu, 0, &weights)?;
    }
    let x = Tensor::from_slice(&cpu, SHAPE.tokens, SHAPE.hidden, &x.to_f64(&gpu)?)?;
    let expected = outcome(&mut reference, &x)?;
    for ((name, got), (_, want)) in first.iter().zip(&expected) {
        let square = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>();
        let error = square(&mut got.iter().zip(want).map(|(a, b)| a - b));
        let error = f64::sqrt(error / square(&mut want.iter().copied()));
        println!("# {name}: off by {error:.1e} of its norm");
        if error.is_nan() || error > TOLERANCE {
            return Err(format!("{name} is off by {error:e} of its norm").into());
        }
    }
    println!("# two runs have the same bits");
    Ok(())
}

/// Losses of both passes, gradient of the input and of each weight, by name.
fn outcome<T: Float, D: Backend<T>>(
    model: &mut HeadModel<T, D>,
    x: &Tensor<T, D>,
) -> Result<Vec<(String, Vec<f64>)>, Error> {
    let device = model.cx.device.clone();
    model.loss(x)?;
    let alone = model.cx.stats.loss.total(&device)?;
    let dx = model.backward(x)?;
    let losses = vec![alone, model.cx.stats.loss.total(&device)?];
    let mut outcome =
        vec![("losses".to_owned(), losses), ("gradient of the input".to_owned(), dx.to_f64(&device)?)];
    let params = &mut model.cx.params;
    params.start_reductions(&model.cx.comms)?;
    for bucket in 0..params.buckets().len() {
        let gradients = params.reduced(bucket)?.to_f64(&device)?;
        for part in &params.buckets()[bucket].parts {
            outcome.push((format!("gradient of {}", part.name), gradients[part.range()].to_vec()));
        }
    }
    params.zero_grads(false);
    Ok(outcome)
}
