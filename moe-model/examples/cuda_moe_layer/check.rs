//! The layer beside itself in f64 on the host, and beside a second run.

use std::collections::BTreeMap;

use moe_kernels::{Backend, Cpu, Cuda, Float, Tensor, bf16};

use crate::Error;
use crate::layer::{MoeLayer, Shape, normal};

/// Sizes that are no multiples of any tile.
const SHAPES: [Shape; 2] = [
    Shape { name: "check top-2", hidden: 512, inner: 320, experts: 8, top_k: 2, tokens: 1000 },
    Shape { name: "check top-8", hidden: 256, inner: 192, experts: 32, top_k: 8, tokens: 1500 },
];

/// The largest error of a tensor by its norm. Rounding to bf16 moves a number by 2⁻⁹ of it at most, 0.0017 in the mean square; the
/// longest chain, to the gradient of the input, is ten roundings, some of which the products after them amplify.
const TOLERANCE: f64 = 0.02;

/// What a pass gives, by name.
type Outcome = BTreeMap<String, Vec<f64>>;

/// # Errors
/// A tensor differs by more than rounding explains, or two runs differ in a bit.
pub fn run() -> Result<(), Error> {
    // Memory is poisoned: what is read before it is written shows.
    let (gpu, cpu) = (Cuda::poisoned(0)?, Cpu::new(8));
    for shape in &SHAPES {
        let [x, dy] = [1, 2].map(|key| normal::<bf16, _>(&gpu, shape.tokens, shape.hidden, 1.0, key));
        let (x, dy) = (x?, dy?);
        let mut ours = MoeLayer::<bf16, Cuda>::new(gpu.clone(), shape, 0.1)?;
        ours.cx.recorded = Some(BTreeMap::new());
        let first = outcome(&mut ours, &x, &dy)?;
        let recorded = ours.cx.recorded.take().unwrap_or_default();
        if outcome(&mut ours, &x, &dy)? != first {
            return Err(format!("{}: two runs differ", shape.name).into());
        }

        // The same numbers on the host, and the same choices, as near ties may turn.
        let mut reference = MoeLayer::<f64, Cpu>::new(cpu.clone(), shape, 0.1)?;
        for bucket in 0..ours.cx.params.buckets().len() {
            let weights = ours.cx.params.weights(bucket)?.to_f64(&gpu)?;
            reference.cx.params.weights_mut(bucket)?.upload(&cpu, 0, &weights)?;
        }
        reference.cx.replay = Some(recorded.into_iter().map(|(at, routing)| (at, routing.experts)).collect());
        let on_host = |x: &Tensor<bf16, Cuda>| -> Result<Tensor<f64, Cpu>, Error> {
            Ok(Tensor::from_slice(&cpu, shape.tokens, shape.hidden, &x.to_f64(&gpu)?)?)
        };
        let expected = outcome(&mut reference, &on_host(&x)?, &on_host(&dy)?)?;
        for (name, expected) in &expected {
            let got = &first[name];
            let square = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>();
            let error = square(&mut got.iter().zip(expected).map(|(a, b)| a - b));
            let error = f64::sqrt(error / square(&mut expected.iter().copied()));
            println!("# {}: {name} is off by {error:.1e} of its norm", shape.name);
            if error.is_nan() || error > TOLERANCE {
                return Err(format!("{}: {name} is off by {error:e} of its norm", shape.name).into());
            }
        }
        println!("# {}: two runs have the same bits", shape.name);
    }
    Ok(())
}

/// Output, gradient of the input, and gradients of the weights, those of all experts together.
fn outcome<T: Float, D: Backend<T>>(
    layer: &mut MoeLayer<T, D>,
    x: &Tensor<T, D>,
    dy: &Tensor<T, D>,
) -> Result<Outcome, Error> {
    let [y, dx] = layer.pass(x, dy)?;
    let device = layer.cx.device.clone();
    // The experts' part of the output and of the gradient: what passes by them is right anyway.
    let beside = |a: Tensor<T, D>, b: &Tensor<T, D>| -> Result<Vec<f64>, Error> {
        let (a, b) = (a.to_f64(&device)?, b.to_f64(&device)?);
        Ok(a.iter().zip(&b).map(|(a, b)| a - b).collect())
    };
    let mut outcome = Outcome::from([
        ("output".to_owned(), beside(y, x)?),
        ("gradient of the input".to_owned(), beside(dx, dy)?),
    ]);
    let params = &mut layer.cx.params;
    params.start_reductions(&layer.cx.comms)?;
    for bucket in 0..params.buckets().len() {
        let gradients = params.reduced(bucket)?.to_f64(&device)?;
        for part in &params.buckets()[bucket].parts {
            let name = part.name.trim_end_matches(".weight").rsplit('.').next().unwrap_or(&part.name);
            let of_name = outcome.entry(format!("gradient of {name}")).or_default();
            of_name.extend_from_slice(&gradients[part.range()]);
        }
    }
    Ok(outcome)
}
