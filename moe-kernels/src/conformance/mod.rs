//! The suite that every backend has to pass (feature `conformance`).
//!
//! One function per kernel family, to be called from a test of the backend. Forward kernels are held to a naive
//! reference in `f64` that is written here, independently of any backend; backward kernels to five-point central
//! differences of that reference (error about 1e-11, hence never tighter than [`GRADIENT`]). Operands lie in the middle
//! of larger matrices of NaN, at odd offsets and strides (at multiples of 16 bytes where rows are of whole 64 elements): a kernel that reads or writes outside, or reads what it
//! should overwrite, is caught. Every function panics where the backend is wrong.
//!
//! `tolerance` is relative to the largest element of the result: some ten units of rounding of `T`, for example
//! `1e-5` for `f32` and `1e-12` for `f64`.
//!
//! ```
//! use moe_kernels::{Cpu, conformance};
//!
//! conformance::gemm::<f64, _>(&Cpu::new(1), 1e-12);
//! ```

mod activation;
mod attention;
mod balance;
mod choices;
mod elementwise;
mod embedding;
mod gemm;
mod grouped;
mod grouped_bias;
mod grouped_glu;
mod host;
mod loss;
mod memory;
mod norm;
mod norm_rope;
mod optim;
mod reduce;
mod rope;
mod routing;
mod rows;

pub use activation::activation;
pub use attention::attention;
pub use balance::balance;
pub use elementwise::elementwise;
pub use embedding::embedding;
pub use gemm::gemm;
pub use grouped::grouped_gemm;
pub use grouped_bias::grouped_bias;
pub use grouped_glu::grouped_glu;
pub use loss::loss;
pub use memory::memory;
pub use norm::norm;
pub use norm_rope::norm_rope;
pub use optim::optim;
pub use reduce::reduce;
pub use rope::rope;
pub use routing::routing;
pub use rows::rows;

use crate::{Backend, Float};

/// The tightest tolerance for gradients: what differences of the reference are good for.
pub const GRADIENT: f64 = 1e-9;

/// Runs the suites of all families.
pub fn all<T: Float, D: Backend<T>>(device: &D, tolerance: f64) {
    memory(device);
    rows::<T, D>(device);
    rows::<i32, D>(device);
    elementwise::<T, D>(device, tolerance);
    gemm::<T, D>(device, tolerance);
    grouped_gemm::<T, D>(device, tolerance);
    grouped_bias::<T, D>(device, tolerance);
    grouped_glu::<T, D>(device, tolerance);
    norm::<T, D>(device, tolerance);
    rope::<T, D>(device, tolerance);
    norm_rope::<T, D>(device, tolerance);
    attention::<T, D>(device, tolerance);
    activation::<T, D>(device, tolerance);
    routing::<T::Acc, D>(device, tolerance);
    balance::<T::Acc, D>(device, tolerance);
    embedding::<T, D>(device, tolerance);
    loss::<T, D>(device, tolerance);
    optim::<T, D>(device, tolerance);
    reduce::<T, D>(device, tolerance);
}
