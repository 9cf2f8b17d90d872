//! Loops compiled for several instruction sets, the best one chosen at run time.

/// Defines functions whose bodies are compiled once per SIMD level that `pulp` knows.
///
/// A body is plain Rust over slices that the compiler vectorises; what it calls must be `#[inline(always)]`, or it
/// stays at the baseline. Sums must spell out their lanes ([`super::lanes`]), since the compiler may not reorder
/// them; so results don't depend on the level.
macro_rules! simd {
    ($(
        $(#[$attr:meta])*
        $vis:vis fn $name:ident<$t:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)] // the operands of a formula
        $vis fn $name<$t: $crate::cpu::float::CpuFloat>($($arg: $ty),*) $(-> $ret)? {
            struct Body<A>(A);
            impl<$t: $crate::cpu::float::CpuFloat> pulp::WithSimd for Body<($($ty,)*)> {
                type Output = simd!(@output $($ret)?);
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _simd: S) -> Self::Output {
                    #[allow(unused_mut, reason = "not every argument is written")]
                    let Body(($(mut $arg,)*)) = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Body(($($arg,)*)))
        }
    )*};
    (@output) => { () };
    (@output $ret:ty) => { $ret };
}
pub(super) use simd;
