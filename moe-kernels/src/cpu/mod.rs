//! The backend of every machine: all kernel families in `f32` and `f64`.
//!
//! Matrix products go through `faer`; everything else is loops over rows that the compiler vectorises for the
//! instruction set found at run time. Work is cut in pieces by the shapes alone, so that one thread and many give the
//! same bits.

mod activation;
mod attention;
mod balance;
mod choices;
mod device;
mod elementwise;
mod embedding;
mod float;
mod gemm;
mod grouped;
mod grouped_bias;
mod lanes;
mod loss;
mod matrix;
mod norm;
mod optim;
mod parallel;
mod reduce;
mod rope;
mod routing;
mod rows;
mod simd;

pub use device::{Cpu, CpuBuf};
