//! Time of a whole MoE layer on a GPU, forward and backward, in bf16 with gradients of weights in f32, and of its parts. Every
//! backward is that of a step's first micro-batch, which writes the gradients of weights; later ones add to them.
//!
//! ```text
//! cargo run --release -p moe-model --features cuda --example cuda_moe_layer [SHAPE]
//! ```
//!
//! First the layer is compared with itself in f64 on the host, and with a second run. Then, for each shape (those whose names
//! begin with `SHAPE`), lines separated by tabs: shape, part, milliseconds, and TFLOP/s where the part is products: those of
//! the experts alone, `6 · tokens · top-k · hidden · inner` forward and twice as many backward. The layer is
//! `x + experts(rms_norm(x))`; its parts are what it calls, each timed by itself.
//! `benchmarks/cuda_moe_layer.sh` puts PyTorch's times for the same layer beside them.

mod check;
mod layer;
mod parts;
mod time;

use moe_kernels::{Cuda, Device, bf16};

use layer::{MoeLayer, Shape};
use time::seconds;

/// Mixtral-8x7B, Mixtral-8x22B, Qwen3-30B-A3B, Qwen2-57B-A14B, and Mixtral-8x22B with each expert cut into eight of which
/// eight times as many are chosen.
const SHAPES: [Shape; 5] = [
    Shape { name: "mixtral-8x7b", hidden: 4096, inner: 14336, experts: 8, top_k: 2, tokens: 16384 },
    Shape { name: "mixtral-8x22b", hidden: 6144, inner: 16384, experts: 8, top_k: 2, tokens: 16384 },
    Shape { name: "qwen3-30b-a3b", hidden: 2048, inner: 768, experts: 128, top_k: 8, tokens: 32768 },
    Shape { name: "qwen2-57b-a14b", hidden: 3584, inner: 2560, experts: 64, top_k: 8, tokens: 16384 },
    Shape { name: "mixtral-8x22b-g8t8", hidden: 6144, inner: 2048, experts: 64, top_k: 8, tokens: 16384 },
];

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let gpu = Cuda::new(0)?;
    let only = std::env::args().nth(1).unwrap_or_default();
    let checked = check::run();
    println!("shape\tpart\tms\tTFLOP/s");
    for shape in SHAPES.iter().filter(|shape| shape.name.starts_with(&only)) {
        whole(&gpu, shape)?;
        parts::run(&gpu, shape)?;
    }
    checked
}

/// The layer itself: forward alone, both passes, and the three calls of both, each with its end waited for.
fn whole(gpu: &Cuda, shape: &Shape) -> Result<(), Error> {
    let mut layer = MoeLayer::<bf16, Cuda>::new(gpu.clone(), shape, 0.02)?;
    let x = layer::normal(gpu, shape.tokens, shape.hidden, 1.0, 1)?;
    let dy = layer::normal(gpu, shape.tokens, shape.hidden, 1.0, 2)?;
    let forward = seconds(gpu, || layer.forward(&x).map(drop))?;
    shape.line("layer forward", forward, shape.flops());
    gpu.reset_peak();
    let both = seconds(gpu, || layer.pass(&x, &dy).map(drop))?;
    shape.line("layer forward+backward", both, 3.0 * shape.flops());
    let peak = gpu.memory().peak as f64 / f64::from(1 << 30);
    let calls = layer.calls(&x, &dy)?;
    for (call, seconds) in ["forward", "backward_input", "backward_weight"].iter().zip(calls) {
        shape.line(&format!("call {call}"), seconds, shape.flops());
    }
    let (name, most) = (shape.name, layer.imbalance()?);
    println!("# {name}: the largest expert has {most:.2} times the mean; peak of memory {peak:.1} GiB");
    Ok(())
}
