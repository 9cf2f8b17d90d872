//! The host's backend under the suite that every backend has to pass.

use moe_kernels::family::{DropLimit, Routing};
use moe_kernels::{Backend, Cpu, Float, Result, Tensor, conformance};

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
fn the_last_slot_takes_no_more_memory_than_the_first() -> Result<()> {
    let cpu = Cpu::poisoned(1);
    let experts = Tensor::from_slice(&cpu, 3, 1, &[2, 2, 2])?;
    let slots = Tensor::from_slice(&cpu, 1, 3, &[i32::MAX, 0, i32::MAX - 1])?;
    let mut kept = Tensor::uninit(&cpu, 3, 1)?;
    let limit = DropLimit { num_experts: 3, unit_slots: 2, capacity: 1 };
    Routing::<f32>::drop_excess(&cpu, kept.view_mut()?, experts.view(), None, slots.view(), limit)?;
    assert_eq!(kept.to_vec(&cpu)?, [-1, 2, 2]);
    Ok(())
}

#[test]
fn cpu_is_a_whole_backend() {
    fn backend<T: Float>(_: impl Backend<T>) {}
    backend::<f32>(Cpu::default());
    backend::<f64>(Cpu::default());
}
