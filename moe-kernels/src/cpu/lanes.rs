//! Sums and maxima in a fixed number of lanes: vectorised, and the same on every machine.

use super::float::CpuFloat;

const LANES: usize = 16;

/// Halves the lanes until one is left.
#[inline(always)]
fn fold<T: Copy>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ f(a[i])`.
#[inline(always)]
pub(super) fn sum_by<T: CpuFloat>(a: &[T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    fold(lanes, |x, y| x + y)
}

/// `Σ f(a[i], b[i])` over two slices of one length, in a type of the caller's choice.
#[inline(always)]
pub(super) fn sum_by2<T: Copy, A: CpuFloat>(a: &[T], b: &[T], f: impl Fn(T, T) -> A) -> A {
    let mut lanes = [A::ZERO; LANES];
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(x, y);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += f(x, y);
    }
    fold(lanes, |x, y| x + y)
}

/// `Σ f(a[i], b[i], c[i])` over three slices of one length.
#[inline(always)]
pub(super) fn sum_by3<T: CpuFloat>(a: &[T], b: &[T], c: &[T], f: impl Fn(T, T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let ((b_chunks, b_rest), (c_chunks, c_rest)) = (b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for ((a, b), c) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
        for (((lane, &x), &y), &z) in lanes.iter_mut().zip(a).zip(b).zip(c) {
            *lane += f(x, y, z);
        }
    }
    for (((lane, &x), &y), &z) in lanes.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *lane += f(x, y, z);
    }
    fold(lanes, |x, y| x + y)
}

#[inline(always)]
fn larger<T: CpuFloat>(x: T, y: T) -> T {
    if x < y { y } else { x }
}

/// The largest element, −∞ of none; a NaN may or may not be seen.
#[inline(always)]
pub(super) fn max<T: CpuFloat>(a: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x);
    }
    fold(lanes, larger)
}

/// Replaces every element by `exp(element − by)` and returns the sum.
#[inline(always)]
pub(super) fn exp_sum<T: CpuFloat>(a: &mut [T], by: T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (chunks, rest) = a.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = (*x - by).exp();
            *lane += *x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = (*x - by).exp();
        *lane += *x;
    }
    fold(lanes, |x, y| x + y)
}
