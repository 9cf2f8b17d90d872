//! Types of floats in the files of the hub.

use half::f16;
use moe_kernels::{Float, bf16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// A type of floats in a safetensors file, named as in the key `dtype` of a `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FloatType {
    /// 64-bit IEEE floats.
    #[serde(rename = "float64")]
    F64,
    /// 32-bit IEEE floats.
    #[serde(rename = "float32")]
    F32,
    /// bfloat16.
    #[serde(rename = "bfloat16")]
    Bf16,
    /// 16-bit IEEE floats.
    #[serde(rename = "float16")]
    F16,
}

impl FloatType {
    /// The type that a file names, if its weights can be read.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F64 => Some(FloatType::F64),
            Dtype::F32 => Some(FloatType::F32),
            Dtype::BF16 => Some(FloatType::Bf16),
            Dtype::F16 => Some(FloatType::F16),
            _ => None,
        }
    }

    /// Its name in a file.
    pub(super) const fn dtype(self) -> Dtype {
        match self {
            FloatType::F64 => Dtype::F64,
            FloatType::F32 => Dtype::F32,
            FloatType::Bf16 => Dtype::BF16,
            FloatType::F16 => Dtype::F16,
        }
    }

    /// Its name in a `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            FloatType::F64 => "float64",
            FloatType::F32 => "float32",
            FloatType::Bf16 => "bfloat16",
            FloatType::F16 => "float16",
        }
    }

    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            FloatType::F64 => 8,
            FloatType::F32 => 4,
            FloatType::Bf16 | FloatType::F16 => 2,
        }
    }

    /// Appends little-endian elements to `out`, widened exactly or rounded to the nearest, ties to even.
    ///
    /// # Errors
    /// The place and value of the first that is not finite, in the file or in `A`.
    pub(super) fn decode<A: Float>(self, bytes: &[u8], out: &mut Vec<A>) -> Result<(), (usize, f64)> {
        fn each<A: Float, const N: usize>(
            bytes: &[u8],
            out: &mut Vec<A>,
            widen: impl Fn([u8; N]) -> f64,
        ) -> Result<(), (usize, f64)> {
            for (at, element) in bytes.as_chunks::<N>().0.iter().enumerate() {
                let value = widen(*element);
                let converted = A::from_f64(value);
                if !converted.to_f64().is_finite() {
                    return Err((at, value));
                }
                out.push(converted);
            }
            Ok(())
        }
        match self {
            FloatType::F64 => each(bytes, out, f64::from_le_bytes),
            FloatType::F32 => each(bytes, out, |element| f32::from_le_bytes(element).into()),
            FloatType::Bf16 => each(bytes, out, |element| bf16::from_le_bytes(element).to_f64()),
            FloatType::F16 => each(bytes, out, |element| f16::from_le_bytes(element).to_f64()),
        }
    }

    /// Appends elements to `out`, little-endian, widened exactly or rounded to the nearest, ties to even.
    ///
    /// # Errors
    /// The place and value of the first that is not finite, here or in this type.
    pub(super) fn encode<A: Float>(self, elements: &[A], out: &mut Vec<u8>) -> Result<(), (usize, f64)> {
        for (at, element) in elements.iter().enumerate() {
            let value = element.to_f64();
            let finite = match self {
                FloatType::F64 => put(out, value.to_le_bytes(), value.is_finite()),
                FloatType::F32 => {
                    let rounded = value as f32;
                    put(out, rounded.to_le_bytes(), rounded.is_finite())
                }
                FloatType::Bf16 => {
                    let rounded = <bf16 as Float>::from_f64(value);
                    put(out, rounded.to_le_bytes(), rounded.is_finite())
                }
                FloatType::F16 => {
                    let rounded = f16_from_f64(value);
                    put(out, rounded.to_le_bytes(), rounded.is_finite())
                }
            };
            if !finite {
                return Err((at, value));
            }
        }
        Ok(())
    }
}

fn put<const N: usize>(out: &mut Vec<u8>, bytes: [u8; N], finite: bool) -> bool {
    out.extend_from_slice(&bytes);
    finite
}

impl std::fmt::Display for FloatType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rounds to the nearest, ties to even. (`f16::from_f64` drops the last bits of a double first.)
fn f16_from_f64(x: f64) -> f16 {
    let near = x as f32;
    if f64::from(near) == x || !near.is_finite() {
        return f16::from_f32(near);
    }
    // Rounded to odd: cut off, the last bit set because something was cut. With two bits more than the result has, rounding
    // that again is rounding once.
    let towards_zero = if f64::from(near.abs()) > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f16::from_f32(f32::from_bits(towards_zero | 1))
}
