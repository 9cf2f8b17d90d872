//! The arithmetic that kernels of the host need beyond [`Float`].

use faer::{Accum, MatMut, MatRef, Par};
use half::bf16;

use crate::Float;

/// A float that the host computes in: `f32` and `f64`.
pub trait CpuFloat: Float<Acc = Self> {
    /// −∞.
    const NEG_INFINITY: Self;

    /// `e^self`: for `f32` a polynomial that vectorises, within 2 units in the last place.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// `ln(1 + self)`, also where `self` is lost beside 1.
    fn ln_1p(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Rounds to the nearest, ties to even.
    fn to_bf16(self) -> bf16;
    /// Exact.
    fn from_bf16(x: bf16) -> Self;

    /// `y = alpha · a · b`, or `y += …` with [`Accum::Add`], on the calling thread.
    fn matmul(y: MatMut<'_, Self>, accum: Accum, a: MatRef<'_, Self>, b: MatRef<'_, Self>, alpha: Self);

    /// `1 / (1 + e^−self)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp())
    }
}

macro_rules! cpu_float {
    ($t:ident, $exp:expr, $to_bf16:expr, $from_bf16:expr) => {
        impl CpuFloat for $t {
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $t::ln(self)
            }
            #[inline(always)]
            fn ln_1p(self) -> Self {
                $t::ln_1p(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $t::is_finite(self)
            }
            #[inline(always)]
            fn to_bf16(self) -> bf16 {
                $to_bf16(self)
            }
            #[inline(always)]
            fn from_bf16(x: bf16) -> Self {
                $from_bf16(x)
            }
            fn matmul(
                y: MatMut<'_, Self>,
                accum: Accum,
                a: MatRef<'_, Self>,
                b: MatRef<'_, Self>,
                alpha: Self,
            ) {
                faer::linalg::matmul::matmul(y, accum, a, b, alpha, Par::Seq);
            }
        }
    };
}
cpu_float!(f32, exp_f32, bf16::from_f32, bf16::to_f32);
cpu_float!(f64, f64::exp, <bf16 as Float>::from_f64, bf16::to_f64);

/// `e^x` after Cephes' `expf`: `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`, a polynomial in `r`, scaled by `2^n`.
///
/// No branches and no calls, so that loops over it vectorise (processors without fused multiply-add, older than AVX2,
/// get the same bits from a slow call). Overflows to ∞, underflows through the subnormal numbers to 0, keeps NaN.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    /// Added and subtracted, it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23
    // Comparisons, not `clamp`, so that NaN passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few bits.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4;
    let p = r.mul_add(p, 1.398_2e-3);
    let p = r.mul_add(p, 8.333_452e-3);
    let p = r.mul_add(p, 4.166_579_6e-2);
    let p = r.mul_add(p, 1.666_666_5e-1);
    let p = r.mul_add(p, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, both normal numbers where the product may not be.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_of_f32_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in -1_030_000..885_000 {
            let x = i as f32 * 1e-4 + 3e-6;
            let (got, want) = (exp_f32(x), f64::exp(x as f64));
            if want > f32::MAX as f64 {
                continue;
            }
            let ulp = (want as f32).abs().max(f32::MIN_POSITIVE);
            let ulp = (f32::from_bits(ulp.to_bits() + 1) - ulp) as f64;
            worst = worst.max((got as f64 - want).abs() / ulp);
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_of_f32_at_the_edges() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(-0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-200.0), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(88.8), f32::INFINITY);
        assert!(exp_f32(88.72).is_finite());
        assert!(exp_f32(-100.0) > 0.0, "subnormal results exist");
        assert!(exp_f32(f32::NAN).is_nan());
    }
}
