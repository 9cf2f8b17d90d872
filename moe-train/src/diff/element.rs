//! Elements of tensors as doubles.

use half::{bf16, f16};
use safetensors::Dtype;

/// Elements in place of those in `out`; false, and none, if they are no numbers of at most 64 bits with a type of their own
/// in Rust or among half floats. Integers beyond 2^53 are rounded.
pub(super) fn decode(dtype: Dtype, bytes: &[u8], out: &mut Vec<f64>) -> bool {
    fn each<const N: usize>(bytes: &[u8], out: &mut Vec<f64>, widen: impl Fn([u8; N]) -> f64) {
        out.extend(bytes.as_chunks::<N>().0.iter().map(|element| widen(*element)));
    }
    out.clear();
    match dtype {
        Dtype::F64 => each(bytes, out, f64::from_le_bytes),
        Dtype::F32 => each(bytes, out, |element| f32::from_le_bytes(element).into()),
        Dtype::BF16 => each(bytes, out, |element| bf16::from_le_bytes(element).to_f64()),
        Dtype::F16 => each(bytes, out, |element| f16::from_le_bytes(element).to_f64()),
        Dtype::I64 => each(bytes, out, |element| i64::from_le_bytes(element) as f64),
        Dtype::U64 => each(bytes, out, |element| u64::from_le_bytes(element) as f64),
        Dtype::I32 => each(bytes, out, |element| i32::from_le_bytes(element).into()),
        Dtype::U32 => each(bytes, out, |element| u32::from_le_bytes(element).into()),
        Dtype::I16 => each(bytes, out, |element| i16::from_le_bytes(element).into()),
        Dtype::U16 => each(bytes, out, |element| u16::from_le_bytes(element).into()),
        Dtype::I8 => each(bytes, out, |element| i8::from_le_bytes(element).into()),
        Dtype::U8 | Dtype::BOOL => each(bytes, out, |[element]| element.into()),
        _ => return false,
    }
    true
}
