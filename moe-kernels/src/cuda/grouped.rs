//! Matrix products of row groups with a weight each.

use super::Cuda;
use super::fault::Fault;
use super::grouped_hopper::{Product, Tiles};
use super::source::GROUPED;
use crate::family::{GroupedGemm, Op};
use crate::{Float, Result, View, ViewMut, check};

/// Rows and columns of the result that a block owns, and its threads: `TILE` and `THREADS` of the kernels.
const TILE: usize = 64;
const THREADS: usize = 256;

/// What is wrong with offsets that the Cpu refuses at the call.
pub(super) const UNSOUND: Fault =
    Fault::Argument { what: "offsets do not ascend from 0 to at most the rows" };

impl<T: Float> GroupedGemm<T> for Cuda {
    fn grouped_gemm(
        &self,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        tw: Op,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        let ([n, to], [_, from]) = (y.shape(), x.shape());
        let (groups, _) = check::grouped_gemm("grouped_gemm", &y, x, w, tw, offsets)?;
        let (product, name) = match tw {
            Op::T => (Product::Forward, "grouped_gemm_t"),
            Op::N => (Product::InputGradient, "grouped_gemm_n"),
        };
        let tiles = Tiles { product, y: (&y).into(), a: x.into(), b: w.into(), groups, add: false };
        if tiles.fit(self) {
            let launch = tiles.launch(self, offsets)?.uses(y.buf()).uses(x.buf()).uses(w.buf());
            // SAFETY: shapes and alignments fit, and the kernel does nothing if the offsets pass the rows.
            return unsafe { launch.fault(UNSOUND).launch() };
        }
        let blocks = (n.div_ceil(TILE) + groups) * to.div_ceil(TILE);
        let launch = self.kernel(&GROUPED.of(T::DTYPE), name)?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch =
            launch.mat_mut(&mut y).mat(x).mat(w).vector(offsets).size(groups).size(n).size(to).size(from);
        // SAFETY: shapes fit, and the kernel does nothing if the offsets pass the rows.
        unsafe { launch.fault(UNSOUND).launch() }
    }

    fn grouped_gemm_to_acc(
        &self,
        g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        self.weight_gradients("grouped_gemm_to_acc", g, false, dy, x, offsets)
    }

    fn grouped_gemm_acc(
        &self,
        g: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        self.weight_gradients("grouped_gemm_acc", g, true, dy, x, offsets)
    }
}

impl Cuda {
    /// `g_e = dy_eᵀ · x_e`, or `g_e += …`; `kernel` of `grouped.cu` does the same.
    fn weight_gradients<T: Float>(
        &self,
        kernel: &'static str,
        mut g: ViewMut<'_, T::Acc, Self>,
        add: bool,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        let [n, _] = dy.shape();
        let (groups, [out, input]) = check::grouped_gemm_acc(kernel, &g, dy, x, offsets)?;
        let product = Product::WeightGradient;
        let tiles = Tiles { product, y: (&g).into(), a: dy.into(), b: x.into(), groups, add };
        if tiles.fit(self) {
            let launch = tiles.launch(self, offsets)?.uses(g.buf()).uses(dy.buf()).uses(x.buf());
            // SAFETY: shapes and alignments fit, and the kernel does nothing if the offsets pass the rows.
            return unsafe { launch.fault(UNSOUND).launch() };
        }
        let blocks = groups * out.div_ceil(TILE) * input.div_ceil(TILE);
        let launch = self.kernel(&GROUPED.of(T::DTYPE), kernel)?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch =
            launch.mat_mut(&mut g).mat(dy).mat(x).vector(offsets).size(groups).size(n).size(out).size(input);
        // SAFETY: shapes fit, and the kernel does nothing if the offsets pass the rows.
        unsafe { launch.fault(UNSOUND).launch() }
    }
}
