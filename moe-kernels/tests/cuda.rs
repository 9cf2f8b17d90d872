//! The GPU's backend under the suite that every backend has to pass, and what needs no GPU to be tested.
//!
//! Where there is no GPU, the suites say that they were skipped; with `MOE_REQUIRE_GPU` in the environment they fail.

#[path = "cuda/aligned.rs"]
mod aligned;
#[path = "cuda/attention_order.rs"]
mod attention_order;
mod gpu;
#[path = "cuda/grouped.rs"]
mod grouped;
#[path = "cuda/grouped_glu.rs"]
mod grouped_glu;
#[path = "cuda/handles.rs"]
mod handles;
#[path = "cuda/latent.rs"]
mod latent;

use gpu::gpu;
use moe_kernels::{Backend, Cuda, Error, Float, bf16, cuda};

/// One test for each suite and type.
macro_rules! suites {
    ($($name:ident: $suite:ident::<$($t:ty),*>($($tolerance:expr)?);)*) => {$(
        #[test]
        fn $name() {
            if let Some(gpu) = gpu(stringify!($name)) {
                moe_kernels::conformance::$suite::<$($t,)* Cuda>(&gpu $(, $tolerance)?);
            }
        }
    )*};
}
suites! {
    grouped_gemm_f32: grouped_gemm::<f32>(1e-5);
    grouped_gemm_f64: grouped_gemm::<f64>(1e-12);
    grouped_gemm_bf16: grouped_gemm::<bf16>(1e-2);
    memory: memory::<>();
    rows_f32: rows::<f32>();
    rows_f64: rows::<f64>();
    rows_bf16: rows::<bf16>();
    rows_i32: rows::<i32>();
    norm_f32: norm::<f32>(1e-5);
    norm_f64: norm::<f64>(1e-12);
    norm_bf16: norm::<bf16>(2e-2);
    rope_f32: rope::<f32>(1e-5);
    rope_f64: rope::<f64>(1e-12);
    rope_bf16: rope::<bf16>(2e-2);
    norm_rope_f32: norm_rope::<f32>(1e-5);
    norm_rope_f64: norm_rope::<f64>(1e-12);
    norm_rope_bf16: norm_rope::<bf16>(2e-2);
    activation_f32: activation::<f32>(1e-5);
    activation_f64: activation::<f64>(1e-12);
    activation_bf16: activation::<bf16>(2e-2);
    embedding_f32: embedding::<f32>(1e-5);
    embedding_f64: embedding::<f64>(1e-12);
    embedding_bf16: embedding::<bf16>(2e-2);
    loss_f32: loss::<f32>(1e-5);
    loss_f64: loss::<f64>(1e-12);
    loss_bf16: loss::<bf16>(2e-2);
    gemm_f32: gemm::<f32>(1e-5);
    gemm_f64: gemm::<f64>(1e-12);
    gemm_bf16: gemm::<bf16>(1e-2);
    attention_f32: attention::<f32>(1e-5);
    attention_f64: attention::<f64>(1e-12);
    attention_bf16: attention::<bf16>(2e-2);
    elementwise_f32: elementwise::<f32>(1e-6);
    elementwise_f64: elementwise::<f64>(1e-14);
    elementwise_bf16: elementwise::<bf16>(1e-2);
    grouped_glu_f32: grouped_glu::<f32>(1e-5);
    grouped_glu_f64: grouped_glu::<f64>(1e-12);
    grouped_glu_bf16: grouped_glu::<bf16>(2e-2);
    grouped_bias_f32: grouped_bias::<f32>(1e-5);
    grouped_bias_f64: grouped_bias::<f64>(1e-12);
    grouped_bias_bf16: grouped_bias::<bf16>(1e-2);
    routing_f32: routing::<f32>(1e-5);
    routing_f64: routing::<f64>(1e-12);
    balance_f32: balance::<f32>(1e-5);
    balance_f64: balance::<f64>(1e-12);
    optim_f32: optim::<f32>(1e-6);
    optim_f64: optim::<f64>(1e-14);
    optim_bf16: optim::<bf16>(1e-6);
    reduce_f32: reduce::<f32>(1e-6);
    reduce_f64: reduce::<f64>(1e-14);
    reduce_bf16: reduce::<bf16>(1e-6);
}

#[test]
fn attention_in_any_order_bf16() {
    if let Some(gpu) = gpu("attention_in_any_order_bf16") {
        gpu.set_deterministic(false);
        moe_kernels::conformance::attention::<bf16, Cuda>(&gpu, 2e-2);
    }
}

#[test]
fn cuda_is_a_whole_backend() {
    fn backend<T: Float, D: Backend<T>>() {}
    backend::<f32, Cuda>();
    backend::<f64, Cuda>();
    backend::<bf16, Cuda>();
}

#[test]
fn what_is_missing_is_named() {
    let count = match cuda::probe() {
        Ok(count) => count,
        Err(Error::Library { library, looked_for, fix }) => {
            assert!(
                library.contains("libcuda") && looked_for.contains("libcuda.so"),
                "{library}: {looked_for}"
            );
            assert!(fix.contains("driver"), "{fix}");
            assert!(matches!(Cuda::new(0), Err(Error::Library { .. })));
            return;
        }
        // A library without a GPU behind it.
        Err(error) => {
            assert!(matches!(error, Error::Driver { .. } | Error::Unsupported { .. }), "{error}");
            return;
        }
    };
    let beyond = Cuda::new(count).expect_err("one more than there are");
    assert!(matches!(beyond, Error::NoDevice { .. } | Error::Library { .. }), "{beyond}");
}
