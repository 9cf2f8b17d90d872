//! NVIDIA GPUs (feature `cuda`).
//!
//! [`Cuda`] is one GPU with one stream: memory, copies and kernels are ordered by it, and nothing waits but
//! [`Device::download`](crate::Device::download), [`Device::synchronize`](crate::Device::synchronize) and a
//! [`Device::upload`](crate::Device::upload) behind many that are still on their way ([`Cuda::waits`]). Kernels are CUDA C++ inside this crate,
//! compiled for the GPU at hand when they are first used and kept on disk ([`cache_dir`]); matrix products come from
//! cuBLASLt. No CUDA is needed to build. At run time the driver (`libcuda`), NVRTC and cuBLASLt are loaded by name; where
//! one is missing, [`Error::Library`](crate::Error::Library) says which, where it was looked for and how to get it. The forward of attention in
//! bf16 comes from cuDNN where that is there ([`Cuda::cudnn_version`]), the backward with [`Cuda::set_deterministic`]`(false)`; nothing needs it.
//!
//! # Faults
//!
//! What a kernel finds wrong in its data (an index past the end, a logit that is not a number) cannot be returned by the call,
//! which does not wait. The kernel notes the first such row and stays inside its operands; the next `download` or
//! `synchronize` returns the error that [`Cpu`](crate::Cpu) returns at the call, once.
//!
//! # Products of row groups
//!
//! [`GroupedGemm`](crate::family::GroupedGemm) in bf16 has a kernel of its own on Hopper. It takes operands whose rows begin at multiples
//! of 16 bytes (address and row stride), where the rows of the result are whole 16 bytes (8 columns, 4 of weight gradients), for
//! up to 512 groups; everything else goes to a kernel that takes anything and is far slower.
//!
//! [`GroupedGlu`](crate::family::GroupedGlu) is one kernel for such operands, each way: the activation is applied, and its gradient taken, to
//! sums before they leave the multiprocessor.
//!
//! # Example
//!
//! ```no_run
//! use moe_kernels::{Cuda, Device, Tensor};
//!
//! # fn main() -> moe_kernels::Result<()> {
//! let gpu = Cuda::new(0)?;
//! let x = Tensor::<f32, Cuda>::from_slice(&gpu, 1, 3, &[1.0, 2.0, 3.0])?;
//! assert_eq!(x.to_vec(&gpu)?, [1.0, 2.0, 3.0]);
//! # Ok(())
//! # }
//! ```

mod allocator;
mod cache;
mod compile;
mod cublaslt;
mod cudnn;
mod cudnn_graph;
mod device;
mod driver;
mod fault;
mod kernel;
mod lanes;
mod launch;
mod library;
mod side_stream;
mod source;
mod staging;
mod table;
mod tensor_map;
mod tiles;
mod vectors;

mod activation;
mod attention;
mod attention_cudnn;
mod attention_flash;
mod attention_graph;
mod balance;
mod choices;
mod elementwise;
mod embedding;
mod gemm;
mod gemm_parts;
mod grouped;
mod grouped_bias;
mod grouped_glu;
mod grouped_hopper;
mod loss;
mod norm;
mod optim;
mod pieces;
mod reduce;
mod rope;
mod routing;
mod rows;

pub use cache::cache_dir;
pub use device::{Cuda, CudaBuf};
pub use library::probe;
pub use side_stream::{Mark, SideStream};
