//! Products of a matrix in f32 and one in bf16, on the units that multiply bf16.
//!
//! A float is the sum of three bf16, so `a · b` is one product of bf16 over three times the depth: the parts of `a` side by side, times `b` three
//! times below itself. Every product of two elements is exact, as in a product of floats, and sums are in f32.

use super::Cuda;
use super::launch::blocks;
use super::source::GEMM;
use super::vectors::vectors;
use crate::family::Op;
use crate::{Float, Result, Tensor, View, ViewMut};

/// Threads of a block; elements of a thread where parts are made, of which a part has whole multiples, so that rows of parts begin
/// at multiples of 16 bytes.
const THREADS: usize = 256;
const EACH: usize = 8;

/// A matrix `[m, k]` of floats as three of bf16, `[m, 3p]`.
pub(super) struct Parts<T> {
    parts: Tensor<T, Cuda>,
    /// Columns, and those of a part with the zeros behind them.
    columns: usize,
    width: usize,
}

impl<T: Float> Parts<T> {
    /// Of `a`; `T` is bf16.
    pub(super) fn of(device: &Cuda, a: View<'_, T::Acc, Cuda>) -> Result<Self> {
        let [rows, columns] = a.shape();
        let width = columns.next_multiple_of(EACH);
        let mut parts = Tensor::uninit(device, rows, 3 * width)?;
        let launch = device.kernel(&GEMM.of(T::DTYPE), "split")?.vector_mut(&mut parts.view_mut()?).mat(a);
        let launch = launch.size(rows).size(columns).size(width).value(i32::from(vectors(a, EACH / 2)));
        let launch = launch.grid(blocks(rows * width / EACH, THREADS)).block([THREADS, 1, 1]);
        // SAFETY: the kernel reads `rows · columns` elements and writes three parts of `rows · width`.
        unsafe { launch.launch()? };
        Ok(Parts { parts, columns, width })
    }

    /// `y += a · b`, rounded once. `b: [k, n]`, `y: [m, n]`.
    pub(super) fn add_times(
        &self,
        device: &Cuda,
        y: &mut ViewMut<'_, T, Cuda>,
        b: View<'_, T, Cuda>,
    ) -> Result<()> {
        let ([_, n], depth) = (b.shape(), 3 * self.width);
        let mut stacked = Tensor::<T, Cuda>::uninit(device, depth, n)?;
        let launch = device.kernel(&GEMM.of(T::DTYPE), "stack")?.vector_mut(&mut stacked.view_mut()?).mat(b);
        let launch = launch.size(n).size(self.columns).size(self.width);
        // SAFETY: the kernel reads the `columns` rows of `b` and writes `depth` rows as wide.
        unsafe { launch.grid(blocks(depth * n, THREADS)).block([THREADS, 1, 1]).launch()? };
        device.product("gemm_add", y, true, (self.parts.view(), Op::N), (stacked.view(), Op::N))
    }

    /// `g += aᵀ · b`. `b: [m, n]`, `g: [k, n]`.
    pub(super) fn add_transposed_times(
        &self,
        device: &Cuda,
        g: &mut ViewMut<'_, T::Acc, Cuda>,
        b: View<'_, T, Cuda>,
    ) -> Result<()> {
        let [_, n] = b.shape();
        let mut sums = Tensor::<T::Acc, Cuda>::zeros(device, 3 * self.width, n)?;
        let to = &mut sums.view_mut()?;
        device.product("gemm_acc", to, true, (self.parts.view(), Op::T), (b, Op::N))?;
        let launch = device.kernel(&GEMM.of(T::DTYPE), "fold")?.mat_mut(g).vector(sums.view());
        let launch = launch.size(n).size(self.columns).size(self.width);
        // SAFETY: the kernel reads three times `width · n` sums and writes `columns` rows of `g`.
        unsafe { launch.grid(blocks(self.columns * n, THREADS)).block([THREADS, 1, 1]).launch() }
    }
}
