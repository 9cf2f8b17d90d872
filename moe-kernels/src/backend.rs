//! One name for all kernel families.

use crate::Float;
use crate::family::{
    Activation, Attention, Balance, Elementwise, Embedding, Gemm, GroupedBias, GroupedGemm, GroupedGlu, Loss,
    Norm, Optim, Reduce, Rope, Routing, Rows,
};

macro_rules! backend {
    ($($bound:tt)*) => {
        /// A device with every kernel family for weights and activations of type `T`.
        ///
        /// An alias of supertraits (bounds in a `where` clause would not be implied), implemented by every device
        /// that has the families. A router may compute in double precision whatever `T` is.
        pub trait Backend<T: Float>: $($bound)* {}
        impl<T: Float, D> Backend<T> for D where D: $($bound)* {}
    };
}
backend! {
    Gemm<T> + Gemm<T::Acc> + Gemm<f64> + GroupedGemm<T> + GroupedBias<T> + GroupedGlu<T>
        + Rows<T> + Rows<T::Acc> + Rows<i32>
        + Elementwise<T> + Elementwise<T::Acc>
        + Norm<T> + Rope<T> + Attention<T> + Activation<T>
        + Routing<T::Acc> + Routing<f64> + Balance<T::Acc> + Balance<f64>
        + Embedding<T> + Loss<T> + Optim<T>
        + Reduce<T> + Reduce<T::Acc> + Reduce<f64>
}
