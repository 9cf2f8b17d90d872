//! Time of norm, language-model head and cross-entropy on a GPU in bf16 with gradients of weights in f32, and the memory they
//! take.
//!
//! ```text
//! cargo run --release -p moe-model --features cuda --example cuda_head [SHAPE]
//! ```
//!
//! First the head is compared with itself in f64 on the host, and with a second run. Then, for each shape (those whose names
//! begin with `SHAPE`), lines separated by tabs: shape, pass, milliseconds, TFLOP/s of the products with the vocabulary's matrix
//! (`2 · tokens · hidden · vocabulary` of the loss alone, three times as many with gradients), and the peak of memory above what
//! lives between passes in GiB. `benchmarks/cuda_head.sh` puts PyTorch's beside them.

mod check;
mod model;
#[path = "../cuda_moe_layer/time.rs"]
mod time;

use moe_kernels::{Cuda, Device, bf16};

use model::{HeadModel, Shape};
use time::seconds;

/// Qwen3-30B-A3B and Mixtral-8x7B.
const SHAPES: [Shape; 2] = [
    Shape { name: "qwen3-30b-a3b", hidden: 2048, vocab: 151_936, tokens: 16384 },
    Shape { name: "mixtral-8x7b", hidden: 4096, vocab: 32000, tokens: 16384 },
];

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let gpu = Cuda::new(0)?;
    let only = std::env::args().nth(1).unwrap_or_default();
    let checked = check::run();
    println!("shape\tpass\tms\tTFLOP/s\tGiB");
    for shape in SHAPES.iter().filter(|shape| shape.name.starts_with(&only)) {
        let mut model = HeadModel::<bf16, Cuda>::new(gpu.clone(), shape)?;
        let x = model::input(&gpu, shape)?;
        let flops = 2.0 * shape.tokens as f64 * shape.hidden as f64 * shape.vocab as f64;
        for (pass, flops) in [("loss", flops), ("loss and gradients", 3.0 * flops)] {
            let before = gpu.memory().live;
            gpu.reset_peak();
            let seconds = seconds(&gpu, || match pass {
                "loss" => model.loss(&x),
                _ => model.backward(&x).map(drop),
            })?;
            let gib = (gpu.memory().peak - before) as f64 / f64::from(1 << 30);
            let (ms, rate) = (seconds * 1e3, flops / seconds / 1e12);
            println!("{}\t{pass}\t{ms:.2}\t{rate:.0}\t{gib:.2}", shape.name);
        }
    }
    checked
}
