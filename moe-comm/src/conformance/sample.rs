//! Values to send: small integers, exact in every element type, different on every rank.

use half::bf16;
use moe_kernels::{Device, Element, Tensor};

/// Element types that the suite sends.
pub(super) trait Sample: Element + PartialOrd {
    /// An integer up to 255.
    fn of(n: u8) -> Self;
}

macro_rules! sample {
    ($($t:ty => $of:expr),*) => {$(
        impl Sample for $t {
            fn of(n: u8) -> Self {
                $of(n)
            }
        }
    )*};
}
sample!(f64 => f64::from, f32 => f32::from, i64 => i64::from, i32 => i32::from, u8 => u8::from, bf16 => |n| bf16::from_f32(f32::from(n)));

/// Element `i` of what `rank` sends in the round `salt`; eight of them sum to less than 256.
pub(super) fn value(salt: usize, rank: usize, i: usize) -> u8 {
    let mut x = (salt as u64) << 48 ^ (rank as u64) << 32 ^ i as u64;
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    ((x ^ x >> 33) % 32) as u8
}

/// What `rank` sends in the round `salt`.
pub(super) fn values<T: Sample>(salt: usize, rank: usize, n: usize) -> Vec<T> {
    (0..n).map(|i| T::of(value(salt, rank, i))).collect()
}

/// The same as a tensor.
pub(super) fn tensor<T: Sample, D: Device>(
    device: &D,
    salt: usize,
    rank: usize,
    [rows, cols]: [usize; 2],
) -> crate::Result<Tensor<T, D>> {
    Ok(Tensor::from_slice(device, rows, cols, &values::<T>(salt, rank, rows * cols))?)
}
