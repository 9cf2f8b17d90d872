//! The host's backend under the suite that every backend has to pass.

use moe_kernels::{Backend, Cpu, Float, conformance};

macro_rules! suites {
    ($($name:ident: $t:ty, $threads:expr, $tolerance:expr;)*) => {$(
        #[test]
        fn $name() {
            conformance::all::<$t, _>(&Cpu::poisoned($threads), $tolerance);
        }
    )*};
}
suites! {
    f32_on_one_thread: f32, 1, 1e-5;
    f32_on_two_threads: f32, 2, 1e-5;
    f64_on_one_thread: f64, 1, 1e-13;
    f64_on_two_threads: f64, 2, 1e-13;
}

#[test]
fn cpu_is_a_whole_backend() {
    fn backend<T: Float>(_: impl Backend<T>) {}
    backend::<f32>(Cpu::default());
    backend::<f64>(Cpu::default());
}
