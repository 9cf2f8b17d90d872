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

#[cfg(test)]
mod tests {
    use super::*;

    fn reduced<T: bytemuck::Pod>(reduction: Reduction, dtype: DType, parts: &[Vec<T>]) -> Vec<T> {
        let bytes: Vec<&[u8]> = parts.iter().map(|part| cast_slice(part)).collect();
        let mut out = vec![T::zeroed(); parts[0].len()];
        reduce(reduction, dtype, cast_slice_mut(&mut out), &bytes).unwrap();
        out
    }

    /// More than one block, and a last one that is not full.
    const N: usize = 2 * BLOCK + 17;

    #[test]
    fn sums_are_added_in_ascending_rank() {
        let part =
            |rank: usize| (0..N).map(|i| (1.0 + rank as f32).powi(9) / (3 + i) as f32).collect::<Vec<_>>();
        let parts: Vec<_> = (0..5).map(part).collect();
        let ascending: Vec<f32> =
            (0..N).map(|i| (1..5).fold(parts[0][i], |sum, r| sum + parts[r][i])).collect();
        let descending: Vec<f32> =
            (0..N).map(|i| (0..4).rev().fold(parts[4][i], |sum, r| sum + parts[r][i])).collect();
        assert_ne!(ascending, descending);
        assert_eq!(reduced(Reduction::Sum, DType::F32, &parts), ascending);
    }

    #[test]
    fn bf16_is_rounded_once() {
        // 256 + 1 rounds back to 256 in bf16, twice; the sum in f32 does not.
        let parts = [256.0, 1.0, 1.0].map(|x| vec![bf16::from_f32(x); N]);
        assert_eq!(reduced(Reduction::Sum, DType::Bf16, &parts), vec![bf16::from_f32(258.0); N]);
    }

    #[test]
    fn integers_wrap() {
        assert_eq!(reduced(Reduction::Sum, DType::U8, &[vec![200u8], vec![100]]), [44]);
        assert_eq!(reduced(Reduction::Sum, DType::I64, &[vec![i64::MAX], vec![1]]), [i64::MIN]);
        assert_eq!(reduced(Reduction::Max, DType::I32, &[vec![-5], vec![-3], vec![-4]]), [-3]);
    }

    #[test]
    fn the_largest_is_not_a_number_if_one_is_not() {
        for at in 0..3 {
            let mut parts = vec![vec![1.0f64], vec![3.0], vec![2.0]];
            assert_eq!(reduced(Reduction::Max, DType::F64, &parts), [3.0]);
            parts[at][0] = f64::NAN;
            assert!(reduced(Reduction::Max, DType::F64, &parts)[0].is_nan());
        }
    }
}
