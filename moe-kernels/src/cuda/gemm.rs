//! Dense matrix products: cuBLASLt's where it has an algorithm, else a kernel of our own.
//!
//! cuBLASLt takes `f32` and `f64` at any place and stride. For `bf16` it may have none where an address or a row stride is no multiple
//! of 16 bytes; those, and products over nothing (`k = 0`), go to `gemm.cu`.

use super::Cuda;
use super::cublaslt::{Operand, Problem};
use super::gemm_parts::Parts;
use super::source::GEMM;
use crate::family::{Gemm, Op};
use crate::{Element, Float, Result, View, ViewMut, check};

/// Rows and columns of the result that a block of `gemm.cu` owns, and its threads.
const TILE: usize = 64;
const THREADS: usize = 256;

impl<T: Float> Gemm<T> for Cuda {
    fn gemm(
        &self,
        mut y: ViewMut<'_, T, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        self.product("gemm", &mut y, false, (a, ta), (b, tb))
    }

    fn gemm_to_acc(
        &self,
        mut g: ViewMut<'_, T::Acc, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        check::product("gemm_to_acc", g.shape(), ta.shape(a.shape()), tb.shape(b.shape()))?;
        let ([m, n], k) = (g.shape(), ta.shape(a.shape())[1]);
        let size = [m, n, k];
        if !size.contains(&0) && self.by_library(&mut g, false, (a, ta), (b, tb), size)? {
            return Ok(());
        }
        g.zero(self)?;
        self.gemm_acc(g, a, ta, b, tb)
    }

    fn gemm_acc(
        &self,
        mut g: ViewMut<'_, T::Acc, Self>,
        a: View<'_, T, Self>,
        ta: Op,
        b: View<'_, T, Self>,
        tb: Op,
    ) -> Result<()> {
        self.product("gemm_acc", &mut g, true, (a, ta), (b, tb))
    }

    fn gemm_backward(
        &self,
        mut dx: ViewMut<'_, T, Self>,
        mut dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()> {
        let [m, n, k] = check::gemm_backward("gemm_backward", &dx, &dw, dy, x, w)?;
        if m == 0 || n == 0 || k == 0 {
            return Ok(());
        }
        if T::is_acc() {
            // `T` is its own accumulation type, so these are the same matrices.
            let (x, w) = (View::new(x.buf(), x.layout())?, View::new(w.buf(), w.layout())?);
            self.product::<T::Acc, _>("gemm_acc", &mut dw, true, (dy, Op::T), (x, Op::N))?;
            return self.product::<T::Acc, _>("gemm_acc", &mut dx, true, (dy, Op::N), (w, Op::N));
        }
        let parts = Parts::<T>::of(self, dy)?;
        parts.add_transposed_times(self, &mut dw, x)?;
        parts.add_times(self, &mut dx, w)
    }
}

impl Cuda {
    /// `y = op(a) · op(b)`, or `y += …`.
    pub(super) fn product<T: Float, Y: Float>(
        &self,
        kernel: &'static str,
        y: &mut ViewMut<'_, Y, Self>,
        add: bool,
        (a, ta): (View<'_, T, Self>, Op),
        (b, tb): (View<'_, T, Self>, Op),
    ) -> Result<()> {
        check::product(kernel, y.shape(), ta.shape(a.shape()), tb.shape(b.shape()))?;
        let [m, n] = y.shape();
        let k = ta.shape(a.shape())[1];
        if m == 0 || n == 0 || (k == 0 && add) {
            return Ok(());
        }
        if k > 0 && self.by_library(y, add, (a, ta), (b, tb), [m, n, k])? {
            return Ok(());
        }
        self.tiled(kernel, y, (a, ta), (b, tb), [m, n, k])
    }

    /// The product by cuBLASLt, of matrices that fit together, none of them empty; false where it has no algorithm.
    pub(super) fn by_library<T: Float, Y: Float>(
        &self,
        y: &mut ViewMut<'_, Y, Self>,
        add: bool,
        (a, ta): (View<'_, T, Self>, Op),
        (b, tb): (View<'_, T, Self>, Op),
        size: [usize; 3],
    ) -> Result<bool> {
        let problem = Problem {
            dtype: T::DTYPE,
            sums: T::Acc::DTYPE,
            out: Y::DTYPE,
            size,
            y: Operand::of(y.as_view(), Op::N),
            a: Operand::of(a, ta),
            b: Operand::of(b, tb),
            add,
        };
        for buf in [y.as_view().buf(), a.buf(), b.buf()] {
            self.require(buf)?;
        }
        // SAFETY: the shapes fit together, and every matrix lies inside its buffer, on this device.
        unsafe { self.multiply(&problem) }
    }

    /// The product by `gemm.cu`; `kernel` says whether it adds.
    fn tiled<T: Float, Y: Float>(
        &self,
        kernel: &'static str,
        y: &mut ViewMut<'_, Y, Self>,
        (a, ta): (View<'_, T, Self>, Op),
        (b, tb): (View<'_, T, Self>, Op),
        [m, n, k]: [usize; 3],
    ) -> Result<()> {
        let tiles = m.div_ceil(TILE) * n.div_ceil(TILE);
        let launch = self.kernel(&GEMM.of(T::DTYPE), kernel)?.grid([tiles, 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.mat_mut(y).mat(a).mat(b).size(m).size(n).size(k);
        // SAFETY: the shapes fit together, and the kernel touches `m × n`, `m × k` and `k × n` elements.
        unsafe { launch.value(i32::from(ta == Op::T)).value(i32::from(tb == Op::T)).launch() }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::{Cpu, Tensor, cuda};

    /// The kernel that stands in for cuBLASLt, where cuBLASLt would do as well, against the host's products in `f64`.
    #[test]
    fn tiles_give_the_product() {
        if !matches!(cuda::probe(), Ok(count) if count > 0) {
            assert!(std::env::var_os("MOE_REQUIRE_GPU").is_none(), "no CUDA device");
            eprintln!("skipped: no CUDA device");
            return;
        }
        let (gpu, cpu) = (Cuda::new(0).unwrap(), Cpu::new(1));
        for ([m, n, k], ta, tb) in [
            ([65, 130, 33], Op::N, Op::N),
            ([64, 1, 70], Op::N, Op::T),
            ([3, 200, 16], Op::T, Op::N),
            ([129, 63, 1], Op::T, Op::T),
        ] {
            let numbers = |n: usize| (0..n).map(|i| bf16::from_f64(((i * 37 % 101) as f64 - 50.0) / 64.0));
            let (a, b): (Vec<bf16>, Vec<bf16>) = (numbers(m * k).collect(), numbers(k * n).rev().collect());
            let ([ar, ac], [br, bc]) = (ta.shape([m, k]), tb.shape([k, n]));
            let wide = |x: &[bf16]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
            let wa = Tensor::<f64, Cpu>::from_slice(&cpu, ar, ac, &wide(&a)).unwrap();
            let wb = Tensor::<f64, Cpu>::from_slice(&cpu, br, bc, &wide(&b)).unwrap();
            let mut want = Tensor::<f64, Cpu>::uninit(&cpu, m, n).unwrap();
            cpu.gemm(want.view_mut().unwrap(), wa.view(), ta, wb.view(), tb).unwrap();

            let a = Tensor::<bf16, Cuda>::from_slice(&gpu, ar, ac, &a).unwrap();
            let b = Tensor::<bf16, Cuda>::from_slice(&gpu, br, bc, &b).unwrap();
            let mut sums = Tensor::<f32, Cuda>::zeros(&gpu, m, n).unwrap();
            let mut y = Tensor::<bf16, Cuda>::zeros(&gpu, m, n).unwrap();
            let operands = ((a.view(), ta), (b.view(), tb));
            gpu.tiled("gemm_acc", &mut sums.view_mut().unwrap(), operands.0, operands.1, [m, n, k]).unwrap();
            gpu.tiled("gemm", &mut y.view_mut().unwrap(), operands.0, operands.1, [m, n, k]).unwrap();
            let want = want.to_f64(&cpu).unwrap();
            let most = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            let near = |got: Vec<f64>, unit: f64| {
                let worst = got.iter().zip(&want).fold(0.0f64, |w, (x, y)| w.max((x - y).abs()));
                assert!(worst <= unit * most, "{m}×{n}×{k} {ta:?}{tb:?}: {worst} of {most}");
            };
            near(sums.to_f64(&gpu).unwrap(), 1e-5);
            near(y.to_f64(&gpu).unwrap(), 1.0 / 256.0);
        }
    }
}
