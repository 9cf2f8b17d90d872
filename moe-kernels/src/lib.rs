//! Tensors and kernels of one device, for training Mixture-of-Experts Transformers.
//!
//! A [`Device`] is memory with a stream-ordered allocator; compute kernels are traits by family over it
//! ([`family`]), so that a backend may be partial and a third party may bring one. [`Backend`] names all
//! families at once. [`Cpu`] runs on every machine, in `f32` and `f64`; `Cuda` (behind the feature `cuda`) on NVIDIA GPUs, in `bf16` too; the module `conformance`
//! (behind a feature of that name) is the suite that it passes and that any other backend can run.
//!
//! Everything is a matrix `[rows, cols]` with contiguous columns and a row stride: activations are
//! `[tokens, hidden]`, vectors are `[1, n]`. Kernels write into views ([`ViewMut`]), because gradients live
//! in flat buckets. Every forward kernel that needs one has a backward kernel beside it; there is no tape.
//!
//! # Example
//!
//! Two experts, three tokens: the forward product and both gradients.
//!
//! ```
//! use moe_kernels::family::{GroupedGemm, Op};
//! use moe_kernels::{Cpu, Tensor};
//!
//! # fn main() -> moe_kernels::Result<()> {
//! let cpu = Cpu::new(1);
//! // Tokens, sorted by expert: one for expert 0, two for expert 1.
//! let x = Tensor::<f32, Cpu>::from_slice(&cpu, 3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
//! let offsets = Tensor::<i32, Cpu>::from_slice(&cpu, 1, 3, &[0, 1, 3])?;
//! // A weight [1, 2] per expert, one below the other.
//! let w = Tensor::<f32, Cpu>::from_slice(&cpu, 2, 2, &[1.0, 1.0, 10.0, -10.0])?;
//!
//! let mut y = Tensor::<f32, Cpu>::uninit(&cpu, 3, 1)?;
//! cpu.grouped_gemm(y.view_mut()?, x.view(), w.view(), Op::T, offsets.view())?;
//! assert_eq!(y.to_vec(&cpu)?, [3.0, -10.0, -10.0]);
//!
//! let dy = Tensor::<f32, Cpu>::from_slice(&cpu, 3, 1, &[1.0, 1.0, 1.0])?;
//! let mut dx = Tensor::<f32, Cpu>::uninit(&cpu, 3, 2)?;
//! cpu.grouped_gemm(dx.view_mut()?, dy.view(), w.view(), Op::N, offsets.view())?;
//! assert_eq!(dx.to_vec(&cpu)?, [1.0, 1.0, 10.0, -10.0, 10.0, -10.0]);
//!
//! // Weight gradients add to what is there.
//! let mut g = Tensor::<f32, Cpu>::zeros(&cpu, 2, 2)?;
//! cpu.grouped_gemm_acc(g.view_mut()?, dy.view(), x.view(), offsets.view())?;
//! assert_eq!(g.to_vec(&cpu)?, [1.0, 2.0, 8.0, 10.0]);
//! # Ok(())
//! # }
//! ```
//!
//! # When not to use it
//!
//! It knows nothing of other ranks (see `moe-comm`) nor of layers (see `moe-model`). It is no general array library: no
//! broadcasting, no rank above two, no automatic differentiation; for those take `candle` or `burn`.
//!
//! # Same bits
//!
//! Work is cut in pieces by the shapes alone, sums run in a fixed order, and there are no atomics in them: on one
//! machine the same calls give the same bits, on any number of threads. Another machine may have other vector
//! instructions, for which matrix products sum in another order.

#![deny(unsafe_code)]

pub mod backend;
mod check;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
#[allow(unsafe_code)] // calls into the driver and launches of kernels; the rest of the crate has none
pub mod cuda;
pub mod device;
pub mod element;
pub mod error;
pub mod family;
pub mod random;
pub mod tensor;

pub use backend::Backend;
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use device::{Device, MemoryStats};
pub use element::{DType, Element, Float};
pub use error::{Error, Result};
pub use half::bf16;
pub use tensor::{Layout, Tensor, View, ViewMut};

/// The examples of the README run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
