//! Times of the CUDA backend's memory-bound kernels, and the bandwidth they come to beside that of a copy on the same GPU.
//!
//! ```text
//! cargo run --release -p moe-kernels --features cuda-13000 --example cuda_kernels [NAME...]
//! ```
//!
//! One line for each kernel and shape (those that begin with a `NAME`): microseconds, terabytes a second, and that as a
//! share of the copy's; separated by tabs. Bytes are those that the kernel cannot do without: every operand once.
//! `benchmarks/cuda_kernels.sh` puts PyTorch's times for the same work beside them.

mod bench;
mod dense;
mod moe;
mod optim;

use moe_kernels::{Cuda, Result};

fn main() -> Result<()> {
    let bench = bench::Bench::new(Cuda::new(0)?, std::env::args().skip(1).collect())?;
    dense::run(&bench)?;
    moe::run(&bench)?;
    optim::run(&bench)
}
