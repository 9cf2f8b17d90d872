//! The experts' products with the gated activation between them.

use super::Cuda;
use super::grouped::UNSOUND;
use super::grouped_hopper::{TILE_ROWS, fit, gated_backward, gated_forward};
use super::launch::{Launch, blocks};
use super::tensor_map::Tiled;
use crate::family::{Gate, GateGradients, GroupedGlu, Op, gemm_then_glu, gemm_then_glu_backward};
use crate::{Device, Float, Result, View, ViewMut, check};

/// Threads of a block that adds up gradients of probabilities.
const THREADS: usize = 256;

impl<T: Float> GroupedGlu<T> for Cuda {
    fn grouped_gemm_glu(
        &self,
        mut gate_up: ViewMut<'_, T, Self>,
        mut y: ViewMut<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        gate: &Gate<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_gemm_glu";
        let [n, width] = check::glu(KERNEL, y.shape(), gate_up.as_view(), gate.p)?;
        let (groups, [_, input]) = check::grouped_gemm(KERNEL, &gate_up, x, w, Op::T, offsets)?;
        let (a, b, out) = (Tiled::from(x), Tiled::from(w), Tiled::from(&y));
        let halves = Tiled::from(&gate_up).halves();
        if !fit(self, &[a, b], &[halves[0], halves[1], out], groups) {
            return gemm_then_glu(self, gate_up, y, x, w, gate, offsets);
        }
        let build = gated_forward(gate.function);
        let launch = build.begin(self, groups)?;
        let operands = [a.plain(TILE_ROWS as u32)?, b.groups(groups, build.piece_rows())?];
        let results = [build.slices(halves[0])?, build.slices(halves[1])?, build.slices(out)?];
        let launch = operands.into_iter().chain(results).fold(launch, Launch::value);
        let launch = launch.vector_or_null(gate.p).vector(offsets);
        let launch = launch.size(groups).size(n).size(0).size(width).size(input);
        let launch = launch.uses(gate_up.buf()).uses(y.buf()).uses(x.buf()).uses(w.buf());
        // SAFETY: shapes and alignments fit, and the kernel does nothing if the offsets pass the rows.
        unsafe { launch.fault(UNSOUND).launch() }
    }

    fn grouped_gemm_glu_backward(
        &self,
        mut gradients: GateGradients<'_, T, Self>,
        dy: View<'_, T, Self>,
        w: View<'_, T, Self>,
        gate_up: View<'_, T, Self>,
        gate: &Gate<'_, T, Self>,
        offsets: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "grouped_gemm_glu_backward";
        let (groups, [n, out, width]) =
            check::grouped_glu_backward(KERNEL, &gradients, dy, w, gate_up, gate, offsets)?;
        let (a, b) = (Tiled::from(dy), Tiled::from(w));
        let (halves, results) = (Tiled::from(gate_up).halves(), Tiled::from(&gradients.gate_up).halves());
        let operands = [a, b, halves[0], halves[1]];
        let build = gated_backward(gate.function, width, out);
        let Some(build) = build.filter(|_| fit(self, &operands, &results, groups)) else {
            return gemm_then_glu_backward(self, gradients, dy, w, gate_up, gate, offsets);
        };
        let launch = build.begin(self, groups)?;
        let operands = [a.plain(TILE_ROWS as u32)?, b.groups(groups, build.piece_rows())?];
        let slices = halves.into_iter().chain(results).map(|half| build.slices(half));
        let slices = slices.collect::<Result<Vec<_>>>()?;
        let launch = operands.into_iter().chain(slices).fold(launch, Launch::value);
        let launch = launch.vector_or_null(gate.p);
        // Of each row and tile, what adds up to the gradient of the row's probability.
        let tiles = build.column_tiles(width);
        let partial = gradients.p.is_some().then(|| self.alloc(tiles * n * size_of::<f32>())).transpose()?;
        let launch = match &partial {
            Some(partial) => launch.scratch(partial),
            None => launch.value(0u64),
        };
        let launch = launch.vector(offsets).size(groups).size(n).size(0).size(width).size(out);
        let launch = launch.uses(gradients.gate_up.buf()).uses(dy.buf()).uses(w.buf()).uses(gate_up.buf());
        // SAFETY: shapes and alignments fit, and the kernel does nothing if the offsets pass the rows.
        unsafe { launch.fault(UNSOUND).launch()? };
        let (Some(mut p), Some(partial)) = (gradients.p, partial) else { return Ok(()) };
        let launch = self.kernel(&build.variant(), "probability_gradients")?;
        let launch = launch.grid(blocks(n, THREADS)).block([THREADS, 1, 1]).vector_mut(&mut p);
        let launch = launch.scratch(&partial).vector(offsets).size(groups).size(n).size(tiles);
        // SAFETY: the kernel touches at most `n` rows of `p` and of each of the tiles' sums.
        unsafe { launch.launch() }
    }
}
