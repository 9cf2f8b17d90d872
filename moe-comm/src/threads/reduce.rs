//! Reductions over bytes, in ascending rank.

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;
use moe_kernels::DType;

use crate::{Error, Reduction, Result};

/// Elements that are reduced over all ranks before going on to the next ones, so that sums stay in the first cache.
const BLOCK: usize = 2048;

/// Writes the reduction of `parts`, which are as long as `out`, added in their order. There is at least one part.
pub(super) fn reduce(reduction: Reduction, dtype: DType, out: &mut [u8], parts: &[&[u8]]) -> Result<()> {
    match (dtype, reduction) {
        (DType::F64, Reduction::Sum) => fold::<f64>(out, parts, |a, b| a + b),
        (DType::F64, Reduction::Max) => {
            fold::<f64>(out, parts, |a, b| if a > b || a.is_nan() { a } else { b })
        }
        (DType::F32, Reduction::Sum) => fold::<f32>(out, parts, |a, b| a + b),
        (DType::F32, Reduction::Max) => {
            fold::<f32>(out, parts, |a, b| if a > b || a.is_nan() { a } else { b })
        }
        (DType::I64, Reduction::Sum) => fold::<i64>(out, parts, i64::wrapping_add),
        (DType::I64, Reduction::Max) => fold::<i64>(out, parts, i64::max),
        (DType::I32, Reduction::Sum) => fold::<i32>(out, parts, i32::wrapping_add),
        (DType::I32, Reduction::Max) => fold::<i32>(out, parts, i32::max),
        (DType::U8, Reduction::Sum) => fold::<u8>(out, parts, u8::wrapping_add),
        (DType::U8, Reduction::Max) => fold::<u8>(out, parts, u8::max),
        (DType::Bf16, Reduction::Sum) => fold_bf16(out, parts, |a, b| a + b),
        (DType::Bf16, Reduction::Max) => {
            fold_bf16(out, parts, |a, b| if a > b || a.is_nan() { a } else { b })
        }
        _ => return Err(Error::Unsupported { op: "reduction", dtype }),
    }
    Ok(())
}

fn fold<T: bytemuck::Pod>(out: &mut [u8], parts: &[&[u8]], f: impl Fn(T, T) -> T) {
    for (i, out) in cast_slice_mut::<u8, T>(out).chunks_mut(BLOCK).enumerate() {
        for (p, part) in parts.iter().enumerate() {
            let part = &cast_slice::<u8, T>(part)[i * BLOCK..][..out.len()];
            if p == 0 {
                out.copy_from_slice(part);
                continue;
            }
            for (a, &b) in out.iter_mut().zip(part) {
                *a = f(*a, b);
            }
        }
    }
}

/// Sums are kept in `f32` and rounded once.
fn fold_bf16(out: &mut [u8], parts: &[&[u8]], f: impl Fn(f32, f32) -> f32) {
    let mut sums = [0.0f32; BLOCK];
    for (i, out) in cast_slice_mut::<u8, bf16>(out).chunks_mut(BLOCK).enumerate() {
        let sums = &mut sums[..out.len()];
        for (p, part) in parts.iter().enumerate() {
            let part = &cast_slice::<u8, bf16>(part)[i * BLOCK..][..out.len()];
            for (a, b) in sums.iter_mut().zip(part) {
                *a = if p == 0 { b.to_f32() } else { f(*a, b.to_f32()) };
            }
        }
        for (out, &sum) in out.iter_mut().zip(&*sums) {
            *out = bf16::from_f32(sum);
        }
    }
}
