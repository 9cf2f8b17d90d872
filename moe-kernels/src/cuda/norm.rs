//! Root-mean-square normalisation.

use super::Cuda;
use super::lanes::Lanes;
use super::pieces::Pieces;
use super::source::NORM;
use super::vectors::{in_vectors, vector};
use crate::family::Norm;
use crate::{Device, Float, Result, View, ViewMut, check};

/// Threads of a block of a row of any size.
const ANY: [usize; 3] = [256, 1, 1];

/// A build of the backward kernel: vectors of a lane, threads of a block at most, rows of a thread that are under way, and blocks that
/// a multiprocessor runs at once.
#[derive(Clone, Copy)]
struct Build {
    name: &'static str,
    of_lane: usize,
    threads: usize,
    stages: usize,
    blocks: usize,
}

impl Build {
    /// That for rows of so many vectors, if there is one.
    fn of(vectors: usize) -> Option<Self> {
        Some(match vectors {
            0..=32 => {
                Build { name: "rms_norm_backward_1_512", of_lane: 1, threads: 512, stages: 2, blocks: 2 }
            }
            33..=512 => {
                Build { name: "rms_norm_backward_2_256", of_lane: 2, threads: 256, stages: 2, blocks: 3 }
            }
            513..=1024 => {
                Build { name: "rms_norm_backward_2_512", of_lane: 2, threads: 512, stages: 3, blocks: 1 }
            }
            1025..=2048 => {
                Build { name: "rms_norm_backward_4_512", of_lane: 4, threads: 512, stages: 2, blocks: 1 }
            }
            _ => return None,
        })
    }

    /// How rows of so many vectors lie over a block.
    fn lanes(self, vectors: usize) -> Lanes {
        let lanes = vectors.div_ceil(self.of_lane);
        let lanes = if lanes <= 32 { lanes.next_power_of_two() } else { lanes.next_multiple_of(32) };
        Lanes { lanes, rows: self.threads / lanes }
    }

    /// Bytes of shared memory for so many operands.
    fn shared(self, operands: usize) -> usize {
        self.stages * operands * self.of_lane * self.threads * 16
    }
}

/// Rows of a piece, at least, and pieces, at most, of rows of any size.
const ANY_PIECE: usize = 64;

/// The operands of forward; `sums` where rows are parts.
struct Forward<'a, T: Float> {
    y: ViewMut<'a, T, Cuda>,
    rstd: ViewMut<'a, T::Acc, Cuda>,
    x: View<'a, T, Cuda>,
    /// What is added to `x` first, and where the sum goes.
    added: Option<(View<'a, T, Cuda>, ViewMut<'a, T, Cuda>)>,
    w: View<'a, T, Cuda>,
    sums: Option<View<'a, T::Acc, Cuda>>,
    width: usize,
    eps: f64,
}

impl<T: Float> Forward<'_, T> {
    fn run(mut self, gpu: &Cuda, kernel: &'static str) -> Result<()> {
        let [n, h] = check::rms_norm(kernel, &self.y, &self.rstd, self.x, self.w, self.sums)?;
        let mut fits = in_vectors(self.x) && in_vectors(self.w) && in_vectors(self.y.as_view());
        let (mut r, mut sum) = (None, None);
        if let Some((added, to)) = self.added {
            check::shape(kernel, "r", [n, h], added.shape())?;
            check::shape(kernel, "sum", [n, h], to.shape())?;
            fits = fits && in_vectors(added) && in_vectors(to.as_view());
            (r, sum) = (Some(added), Some(to));
        }
        let vectors = h / vector::<T>();
        let one_row =
            |of_lane: usize| Lanes { lanes: vectors.div_ceil(of_lane).next_multiple_of(32), rows: 1 };
        let (name, lanes) = match vectors {
            _ if !fits => ("rms_norm_any", None),
            0..=32 => ("rms_norm_1", Some(Lanes::of_warp(vectors))),
            33..=64 => ("rms_norm_2", Some(Lanes::of_warp(vectors))),
            65..=128 => ("rms_norm_4", Some(Lanes::of_warp(vectors))),
            129..=1024 => ("rms_norm_2", Some(one_row(2))),
            1025..=4096 => ("rms_norm_4", Some(one_row(4))),
            _ => ("rms_norm_any", None),
        };
        let (grid, block) = lanes.map_or(([n, 1, 1], ANY), |lanes| (lanes.grid(n), lanes.block()));
        let launch = gpu.kernel(&NORM.of(T::DTYPE), name)?.grid(grid).block(block);
        let launch = launch.mat_mut(&mut self.y).vector_mut(&mut self.rstd).mat(self.x).mat_or_null(r);
        let launch = launch.mat_mut_or_null(sum.as_mut()).vector(self.w);
        let launch = launch.vector_or_null(self.sums).size(n).size(h);
        // SAFETY: the kernels touch `n` rows of `h` elements, which all shapes are; those of vectors are for rows that are whole
        // vectors, no more than the lanes hold.
        unsafe { launch.acc::<T>(1.0 / self.width as f64).acc::<T>(self.eps).launch() }
    }
}

/// The operands of backward; `sums` where rows are parts.
struct Backward<'a, T: Float> {
    dx: ViewMut<'a, T, Cuda>,
    dw: ViewMut<'a, T::Acc, Cuda>,
    dy: View<'a, T, Cuda>,
    x: View<'a, T, Cuda>,
    w: View<'a, T, Cuda>,
    rstd: View<'a, T::Acc, Cuda>,
    past: Option<View<'a, T, Cuda>>,
    sums: Option<View<'a, T::Acc, Cuda>>,
    width: usize,
}

impl<T: Float> Backward<'_, T> {
    fn run(mut self, gpu: &Cuda, kernel: &'static str) -> Result<()> {
        let Backward { dx, dw, dy, x, w, rstd, past, sums, .. } = &self;
        let [n, h] = check::rms_norm_backward(kernel, dx, dw, *dy, *x, *w, *rstd, *past, *sums)?;
        if n == 0 || h == 0 {
            return Ok(());
        }
        let fits = [self.x, self.dy, self.w, self.dx.as_view()].into_iter().chain(self.past).all(in_vectors);
        let vectors = h / vector::<T>();
        let shared = |build: Build| build.shared(2 + usize::from(self.past.is_some()));
        let Some(build) = Build::of(vectors).filter(|&build| fits && shared(build) <= gpu.most_shared())
        else {
            return self.any(gpu);
        };
        let (lanes, shared) = (build.lanes(vectors), shared(build));
        let pieces = Pieces::of(n, build.blocks, lanes.rows);
        let count = pieces.count(n);
        let partial = gpu.alloc(count * h * size_of::<T::Acc>())?;
        let launch = gpu.kernel(&NORM.of(T::DTYPE), build.name)?.grid([count, 1, 1]).block(lanes.block());
        let launch = launch.shared(shared).mat_mut(&mut self.dx).scratch(&partial);
        let launch = launch.mat(self.dy).mat(self.x).mat_or_null(self.past).vector(self.w).vector(self.rstd);
        let launch = launch.vector_or_null(self.sums).size(n).size(h);
        // SAFETY: the kernel touches `n` rows of `h` elements, whole vectors that the lanes hold, and writes a row of `partial`
        // for each block.
        unsafe { launch.acc::<T>(1.0 / self.width as f64).value(pieces.argument()).launch()? };
        add_pieces::<T>(gpu, self.dw, &partial, count)
    }

    /// Rows of any size: `dx` by rows, then `dw` by columns.
    fn any(mut self, gpu: &Cuda) -> Result<()> {
        let [n, h] = self.x.shape();
        let launch = gpu.kernel(&NORM.of(T::DTYPE), "rms_norm_backward_any")?.grid([n, 1, 1]).block(ANY);
        let launch = launch.mat_mut(&mut self.dx).mat(self.dy).mat(self.x).mat_or_null(self.past);
        let launch = launch.vector(self.w).vector(self.rstd);
        let launch = launch.vector_or_null(self.sums).size(n).size(h).acc::<T>(1.0 / self.width as f64);
        // SAFETY: the kernel touches `n` rows of `h` elements, which all shapes are.
        unsafe { launch.launch()? };
        let rows = n.div_ceil(ANY_PIECE).max(ANY_PIECE);
        let pieces = n.div_ceil(rows);
        let partial = gpu.alloc(pieces * h * size_of::<T::Acc>())?;
        let launch = gpu.kernel(&NORM.of(T::DTYPE), "rms_norm_weight_any")?;
        let launch = launch.grid([h.div_ceil(ANY[0]), pieces, 1]).block(ANY).scratch(&partial);
        let launch = launch.mat(self.dy).mat(self.x).vector(self.rstd).size(n).size(h).size(rows);
        // SAFETY: as above; the kernel writes a row of `partial` for each piece.
        unsafe { launch.launch()? };
        add_pieces::<T>(gpu, self.dw, &partial, pieces)
    }
}

/// Threads across and down a block of `add_pieces`.
const ACROSS: usize = 8;
const PARTS: usize = 64;

/// Adds the rows of `partial: [pieces, h]` to `dw: [1, h]`, in order.
pub(super) fn add_pieces<T: Float>(
    gpu: &Cuda,
    mut dw: ViewMut<'_, T::Acc, Cuda>,
    partial: &<Cuda as Device>::Buf,
    pieces: usize,
) -> Result<()> {
    let h = dw.shape()[1];
    let vector = 16 / size_of::<T::Acc>();
    let (name, columns) = match h.is_multiple_of(vector) {
        true => ("add_pieces", ACROSS * vector),
        false => ("add_pieces_any", ACROSS),
    };
    let launch = gpu.kernel(&NORM.of(T::DTYPE), name)?.grid([h.div_ceil(columns), 1, 1]);
    let launch =
        launch.block([ACROSS, PARTS, 1]).early().vector_mut(&mut dw).scratch(partial).size(pieces).size(h);
    // SAFETY: `partial` holds `pieces` rows of `h` sums, `dw` one.
    unsafe { launch.launch() }
}

/// `sums[i] = Σ x²`, or `Σ dy · w · x` with `(dy, w)`.
fn row_sums<T: Float>(
    gpu: &Cuda,
    mut sums: ViewMut<'_, T::Acc, Cuda>,
    gradient: Option<(View<'_, T, Cuda>, View<'_, T, Cuda>)>,
    x: View<'_, T, Cuda>,
) -> Result<()> {
    let [n, h] = x.shape();
    let fits = in_vectors(x) && gradient.is_none_or(|(dy, w)| in_vectors(dy) && in_vectors(w));
    let (name, lanes) = match fits {
        true => ("rms_norm_sums", Lanes::of(h / vector::<T>())),
        false => ("rms_norm_sums_any", Lanes::of(h)),
    };
    let launch = gpu.kernel(&NORM.of(T::DTYPE), name)?.grid(lanes.grid(n)).block(lanes.block());
    let launch = launch.vector_mut(&mut sums).mat_or_null(gradient.map(|(dy, _)| dy)).mat(x);
    // SAFETY: the kernel reads `n` rows of `h` elements, which all shapes are, and writes `n` sums.
    unsafe { launch.vector_or_null(gradient.map(|(_, w)| w)).size(n).size(h).launch() }
}

impl<T: Float> Norm<T> for Cuda {
    fn rms_norm(
        &self,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        eps: f64,
    ) -> Result<()> {
        let width = x.shape()[1];
        Forward { y, rstd, x, added: None, w, sums: None, width, eps }.run(self, "rms_norm")
    }

    fn add_rms_norm(
        &self,
        sum: ViewMut<'_, T, Self>,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        r: View<'_, T, Self>,
        w: View<'_, T, Self>,
        eps: f64,
    ) -> Result<()> {
        let width = x.shape()[1];
        Forward { y, rstd, x, added: Some((r, sum)), w, sums: None, width, eps }.run(self, "add_rms_norm")
    }

    fn rms_norm_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        past: Option<View<'_, T, Self>>,
    ) -> Result<()> {
        let width = x.shape()[1];
        Backward { dx, dw, dy, x, w, rstd, past, sums: None, width }.run(self, "rms_norm_backward")
    }

    fn rms_norm_sums(&self, sums: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()> {
        check::shape("rms_norm_sums", "sums", [1, x.shape()[0]], sums.shape())?;
        row_sums(self, sums, None, x)
    }

    fn rms_norm_part(
        &self,
        y: ViewMut<'_, T, Self>,
        rstd: ViewMut<'_, T::Acc, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        sums: View<'_, T::Acc, Self>,
        width: usize,
        eps: f64,
    ) -> Result<()> {
        Forward { y, rstd, x, added: None, w, sums: Some(sums), width, eps }.run(self, "rms_norm_part")
    }

    fn rms_norm_backward_sums(
        &self,
        sums: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "rms_norm_backward_sums";
        check::rms_norm_backward_sums(KERNEL, &sums, dy, x, w)?;
        row_sums(self, sums, Some((dy, w)), x)
    }

    fn rms_norm_part_backward(
        &self,
        dx: ViewMut<'_, T, Self>,
        dw: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        x: View<'_, T, Self>,
        w: View<'_, T, Self>,
        rstd: View<'_, T::Acc, Self>,
        sums: View<'_, T::Acc, Self>,
        width: usize,
    ) -> Result<()> {
        Backward { dx, dw, dy, x, w, rstd, past: None, sums: Some(sums), width }
            .run(self, "rms_norm_part_backward")
    }
}
