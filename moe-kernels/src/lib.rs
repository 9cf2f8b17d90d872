//! Tensors and kernels of one device.
//!
//! A [`Device`] is memory with a stream-ordered allocator; compute kernels are traits by family over it
//! ([`family`]), so that a backend may be partial and a third party may bring one. [`Backend`] names all
//! families at once. [`Cpu`] runs on every machine, in `f32` and `f64`.
//!
//! Everything is a matrix `[rows, cols]` with contiguous columns and a row stride: activations are
//! `[tokens, hidden]`, vectors are `[1, n]`. Kernels write into views ([`ViewMut`]), because gradients live
//! in flat buckets.

#![forbid(unsafe_code)]

pub mod backend;
mod check;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod device;
pub mod element;
pub mod error;
pub mod family;
pub mod tensor;

pub mod cpu;

pub use backend::Backend;
pub use cpu::Cpu;
pub use device::{Device, MemoryStats};
pub use element::{DType, Element, Float};
pub use error::{Error, Result};
pub use tensor::{Layout, Tensor, View, ViewMut};
