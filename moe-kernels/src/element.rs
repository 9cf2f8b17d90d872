//! Element types: what a byte of device memory means.

use std::fmt::{Debug, Display};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// The runtime name of an element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// 64-bit IEEE float.
    F64,
    /// 32-bit IEEE float.
    F32,
    /// bfloat16.
    Bf16,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 16-bit unsigned integer.
    U16,
    /// Byte.
    U8,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::U16 => 2,
            DType::U8 => 1,
        }
    }

    /// Lower-case name (`"f32"`), as configurations and manifests write it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U16 => "u16",
            DType::U8 => "u8",
        }
    }
}

impl Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A plain value that tensors hold.
pub trait Element: bytemuck::Pod + Debug + PartialEq + Send + Sync + 'static {
    /// Its runtime name.
    const DTYPE: DType;
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
        }
    )*};
}
element!(f64 => F64, f32 => F32, half::bf16 => Bf16, i64 => I64, i32 => I32, u16 => U16, u8 => U8);

/// A floating-point element and the type its sums are kept in.
///
/// `Acc` is its own accumulator, which ends the recursion of bounds: `bf16 → f32 → f32`, `f64 → f64`.
pub trait Float:
    Element
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
{
    /// Accumulation type: gradients, master weights, moments, statistics.
    type Acc: Float<Acc = Self::Acc>;

    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;

    /// Rounds a double to the nearest value.
    fn from_f64(x: f64) -> Self;
    /// Widens to a double (exact).
    fn to_f64(self) -> f64;
    /// Rounds an accumulator once.
    fn from_acc(x: Self::Acc) -> Self;
    /// Widens to the accumulator (exact).
    fn to_acc(self) -> Self::Acc;

    /// A master weight as the weight and the master's low 16 bits: [`join`](Self::join) makes the same bits of them again. A type
    /// that is its own accumulator is whole, beside 0. Of bf16 the weight is the master rounded to the nearest, ties away
    /// from zero; the highest of the low bits says whether that was up. (Ties to
    /// even need a seventeenth bit: where the weight is even, both neighbouring ties belong to it.) NaN becomes the weight NaN.
    fn split(master: Self::Acc) -> (Self, u16);

    /// The master weight of a weight and its remainder.
    fn join(self, remainder: u16) -> Self::Acc;

    /// Whether the type is its own accumulator.
    fn is_acc() -> bool {
        Self::DTYPE == Self::Acc::DTYPE
    }
}

macro_rules! float {
    (
        $t:ty, $acc:ty, $zero:expr, $one:expr, $from64:expr, $to64:expr, $fromacc:expr, $toacc:expr, $split:expr, $join:expr
    ) => {
        impl Float for $t {
            type Acc = $acc;
            const ZERO: Self = $zero;
            const ONE: Self = $one;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                $from64(x)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline(always)]
            fn from_acc(x: $acc) -> Self {
                $fromacc(x)
            }
            #[inline(always)]
            fn to_acc(self) -> $acc {
                $toacc(self)
            }
            #[inline(always)]
            fn split(master: $acc) -> (Self, u16) {
                $split(master)
            }
            #[inline(always)]
            fn join(self, remainder: u16) -> $acc {
                $join(self, remainder)
            }
        }
    };
}
float!(f64, f64, 0.0, 1.0, |x| x, |x| x, |x| x, |x| x, |x| (x, 0), |x, _| x);
float!(f32, f32, 0.0, 1.0, |x| x as f32, |x| x as f64, |x| x, |x| x, |x| (x, 0), |x, _| x);
float!(
    half::bf16,
    f32,
    half::bf16::ZERO,
    half::bf16::ONE,
    bf16_from_f64,
    half::bf16::to_f64,
    half::bf16::from_f32,
    half::bf16::to_f32,
    split_bf16,
    join_bf16
);

/// The lower half of a float that lies in the middle of two bf16.
const TIE: u32 = 0x8000;

fn split_bf16(master: f32) -> (half::bf16, u16) {
    if master.is_nan() {
        return (half::bf16::NAN, 0);
    }
    // Bits without their sign ascend with the value: a carry out of the mantissa is the next exponent, after the last infinity.
    let bits = master.to_bits();
    (half::bf16::from_bits(((bits + TIE) >> 16) as u16), bits as u16)
}

fn join_bf16(weight: half::bf16, remainder: u16) -> f32 {
    let remainder = u32::from(remainder);
    let bits = (u32::from(weight.to_bits()) << 16) | remainder;
    // What was rounded up goes back.
    f32::from_bits(bits.wrapping_sub((remainder & TIE) << 1))
}

/// Rounds to the nearest bf16, ties to even. (`half::bf16::from_f64` drops the last bits of a double first, so that what is
/// just above a tie may go down.)
fn bf16_from_f64(x: f64) -> half::bf16 {
    let near = x as f32;
    let error = x - f64::from(near);
    if error == 0.0 || x.is_nan() || x.is_infinite() {
        return half::bf16::from_f32(near);
    }
    // Rounded to odd: cut off, the last bit set where something was cut. With two bits more than bf16 has, rounding that
    // again is rounding once.
    let towards_zero = if f64::from(near.abs()) > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    half::bf16::from_f32(f32::from_bits(towards_zero | 1))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::Float;

    /// All upper halves of a float with the lower halves that matter and some others.
    #[test]
    fn weights_and_remainders_are_their_masters() {
        let edges = [0, 1, 2, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0x8002, 0xfffe, 0xffff];
        let lows: Vec<u32> = edges.into_iter().chain((0..0x1_0000).step_by(4093)).collect();
        for bits in (0..0x1_0000).flat_map(|high| lows.iter().map(move |low| high << 16 | low)) {
            let x = f32::from_bits(bits);
            let (weight, remainder) = bf16::split(x);
            if x.is_nan() {
                assert!(weight.is_nan() && weight.join(remainder).is_nan(), "{bits:x}");
                continue;
            }
            assert_eq!(weight.join(remainder).to_bits(), bits, "{bits:x}");
            // `half` rounds ties to even.
            let tie = bits & 0xffff == 0x8000;
            let want = if tie { bf16::from_bits((bits >> 16) as u16 + 1) } else { bf16::from_f32(x) };
            assert_eq!(weight.to_bits(), want.to_bits(), "{bits:x}");
        }
        for x in [1.5f32, f32::MAX, f32::NAN] {
            assert_eq!(f32::split(x).0.join(0).to_bits(), x.to_bits());
        }
    }

    /// Around every tie of two neighbours, by the neighbours themselves.
    #[test]
    fn doubles_are_rounded_to_the_nearest_bf16() {
        for bits in (1..0x7f7f).chain(0x8001..0xff7f) {
            let (low, high) = (bf16::from_bits(bits).to_f64(), bf16::from_bits(bits + 1).to_f64());
            let tie = (low + high) / 2.0;
            let even = if bits % 2 == 0 { low } else { high };
            let [inside, outside] = [tie.to_bits() - 1, tie.to_bits() + 1].map(f64::from_bits);
            for (x, want) in [(low, low), (inside, low), (tie, even), (outside, high), (high, high)] {
                assert_eq!(<bf16 as Float>::from_f64(x).to_f64(), want, "{x:e}");
            }
        }
        for (x, want) in [(3.4e38, f64::INFINITY), (f64::MAX, f64::INFINITY), (1e-300, 0.0), (-0.0, -0.0)] {
            assert_eq!(<bf16 as Float>::from_f64(x).to_f64().to_bits(), want.to_bits(), "{x:e}");
        }
        assert!(<bf16 as Float>::from_f64(f64::NAN).is_nan());
    }
}
