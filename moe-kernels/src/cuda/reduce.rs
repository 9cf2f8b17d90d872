//! Sums, in two launches: parts whose sizes depend on the shapes alone, then their sum.

use super::launch::blocks;
use super::source::{FLOATS, REDUCE};
use super::vectors::{vector, vectors};
use super::{Cuda, CudaBuf};
use crate::family::Reduce;
use crate::{DType, Device, Error, Float, Layout, Result, View, ViewMut, check};

/// Threads of a block.
pub(super) const THREADS: usize = 256;
/// Threads of a block where columns are summed: beside each other, and below.
pub(super) const SUM_BLOCK: [usize; 3] = [32, 8, 1];
/// Blocks of a sum, at most: what a large GPU runs at once.
const PARTS: usize = 528;
/// Vectors of a lane whose squares are summed together, as in the kernel.
const WARP_VECTORS: usize = 64;
/// Vectors of a thread, and rows of a block, at least.
const VECTORS: usize = 8;
const ROWS: usize = 64;

impl Cuda {
    /// The largest of each element of several blocks that lie behind each other, each as long as `out`; not a number where one of them
    /// is none. For backends of collectives, whose libraries lose what is not a number.
    ///
    /// [`Error::Unsupported`] unless `dtype` is a float, [`Error::Argument`] unless `of` is at least one whole block.
    pub fn max_of_blocks(&self, out: &mut CudaBuf, of: &CudaBuf, dtype: DType) -> Result<()> {
        const KERNEL: &str = "max_of_blocks";
        if !FLOATS.contains(&dtype) {
            return Err(Error::Unsupported { what: format!("{KERNEL} of {dtype}") });
        }
        let (len, all) = (Self::byte_len(out), Self::byte_len(of));
        if len == 0 {
            return Ok(());
        }
        let whole = len.is_multiple_of(dtype.size()) && all.is_multiple_of(len) && all > 0;
        check::argument(KERNEL, whole, || format!("{all} bytes are no whole blocks of {len}"))?;
        let n = len / dtype.size();
        let launch = self.kernel(&REDUCE.of(dtype), KERNEL)?.grid(blocks(n, THREADS)).block([THREADS, 1, 1]);
        // SAFETY: the kernel writes the `n` elements of `out`, and reads as many of each of the blocks that there are.
        unsafe { launch.scratch(out).scratch(of).size(n).size(all / len).launch() }
    }
}

impl<T: Float> Reduce<T> for Cuda {
    fn dot(&self, mut out: ViewMut<'_, f64, Self>, a: View<'_, T, Self>, b: View<'_, T, Self>) -> Result<()> {
        const KERNEL: &str = "dot";
        check::shape(KERNEL, "b", a.shape(), b.shape())?;
        check::shape(KERNEL, "out", [1, 1], out.shape())?;
        let [rows, cols] = a.shape();
        let (a, b) = match a.layout().is_contiguous() && b.layout().is_contiguous() {
            true => (a.reshape(1, rows * cols)?, b.reshape(1, rows * cols)?),
            false => (a, b),
        };
        let [rows, cols] = a.shape();
        let n = vector::<T>();
        let per_row = cols.div_ceil(n);
        let blocks = (rows * per_row).div_ceil(VECTORS * THREADS).min(PARTS);
        if blocks == 0 {
            return Ok(());
        }
        let parts = self.alloc(blocks * size_of::<f64>())?;
        let launch = self.kernel(&REDUCE.of(T::DTYPE), KERNEL)?.grid([blocks, 1, 1]).block([THREADS, 1, 1]);
        let launch = launch.scratch(&parts).mat(a).mat(b).size(rows).size(cols).size(per_row);
        let launch = launch.value(i32::from(vectors(a, n) && vectors(b, n)));
        // SAFETY: a block writes one part, of which there are as many; matrices have the same shape.
        unsafe { launch.launch()? };
        let launch = self.kernel(&REDUCE.of(T::DTYPE), "add_parts")?.block([THREADS, 1, 1]);
        // SAFETY: the kernel reads as many parts as there are and writes one element.
        unsafe { launch.vector_mut(&mut out).scratch(&parts).size(blocks).launch() }
    }

    fn sums_of_squares(
        &self,
        mut out: ViewMut<'_, f64, Self>,
        pieces: &[(usize, View<'_, T, Self>)],
    ) -> Result<()> {
        const KERNEL: &str = "sums_of_squares";
        let [_, n] = out.shape();
        check::shape(KERNEL, "out", [1, n], out.shape())?;
        let each = vector::<T>();
        for &(i, x) in pieces {
            check::shape(KERNEL, "a piece", [1, x.shape()[1]], x.shape())?;
            check::argument(KERNEL, i < n, || format!("a piece adds to element {i} of {n}"))?;
        }
        let mut ordered: Vec<_> = pieces.iter().filter(|(_, x)| !x.layout().is_empty()).collect();
        ordered.sort_by_key(|(i, _)| *i);
        // `Piece` and `Total` of the kernels.
        let (mut rows, mut totals, mut parts) = (Vec::<[u64; 4]>::new(), Vec::<[u64; 3]>::new(), 0);
        for &&(i, x) in &ordered {
            let ([_, len], start, first) = (x.shape(), self.start(x, each)?, parts as u64);
            parts += len.div_ceil(32 * WARP_VECTORS * each);
            rows.push([start.address, len as u64, first, u64::from(start.vectors)]);
            match totals.last_mut() {
                Some([last, _, end]) if *last == i as u64 => *end = parts as u64,
                _ => totals.push([i as u64, first, parts as u64]),
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let (pieces, sums) = (self.table(&rows)?, self.alloc(parts * size_of::<f64>())?);
        let (variant, warps) = (REDUCE.of(T::DTYPE), THREADS / 32);
        let launch = self.kernel(&variant, "squares")?.grid([parts.div_ceil(warps), 1, 1]);
        let launch =
            launch.block([THREADS, 1, 1]).scratch(&sums).size(parts).scratch(&pieces).size(rows.len());
        // SAFETY: a warp writes one part, of which there are as many, and reads a piece that has as many elements as it says.
        unsafe { launch.launch()? };
        let table = self.table(&totals)?;
        let launch = self.kernel(&variant, "add_squares")?.grid([totals.len().div_ceil(warps), 1, 1]);
        let launch = launch.block([THREADS, 1, 1]).vector_mut(&mut out).scratch(&sums).scratch(&table);
        // SAFETY: each total is of one element of `out`, below `n`, and of parts that there are.
        unsafe { launch.size(totals.len()).launch() }
    }

    fn column_sums(&self, mut out: ViewMut<'_, T::Acc, Self>, x: View<'_, T, Self>) -> Result<()> {
        let [rows, cols] = x.shape();
        check::shape("column_sums", "out", [1, cols], out.shape())?;
        if cols == 0 {
            return Ok(());
        }
        let across = cols.div_ceil(SUM_BLOCK[0] * vector::<T>());
        let each = rows.div_ceil(PARTS.div_ceil(across)).max(ROWS);
        let down = rows.div_ceil(each);
        if down <= 1 {
            let launch = self.kernel(&REDUCE.of(T::DTYPE), "column_sums")?;
            let launch = launch.vector_mut(&mut out).size(0).mat(x).size(rows).size(cols).size(rows);
            let launch = launch.value(i32::from(vectors(x, vector::<T>())));
            // SAFETY: one row of blocks, which writes `cols` elements.
            return unsafe { launch.grid([across, 1, 1]).block(SUM_BLOCK).launch() };
        }
        let parts = self.alloc(down * cols * size_of::<T::Acc>())?;
        let launch = self.kernel(&REDUCE.of(T::DTYPE), "column_sums")?;
        let launch = launch.scratch(&parts).size(cols).mat(x).size(rows).size(cols).size(each);
        let launch = launch.value(i32::from(vectors(x, vector::<T>())));
        // SAFETY: each of `down` rows of blocks writes a row of `cols` parts.
        unsafe { launch.grid([across, down, 1]).block(SUM_BLOCK).launch()? };
        let sums = View::<T::Acc, Self>::new(&parts, Layout::contiguous(down, cols))?;
        let across = cols.div_ceil(SUM_BLOCK[0] * vector::<T::Acc>());
        let launch = self.kernel(&REDUCE.of(T::DTYPE), "column_sums_of_parts")?;
        let launch = launch.vector_mut(&mut out).size(0).mat(sums).size(down).size(cols).size(down);
        let launch = launch.value(i32::from(vectors(sums, vector::<T::Acc>())));
        // SAFETY: one row of blocks, which writes `cols` elements.
        unsafe { launch.grid([across, 1, 1]).block(SUM_BLOCK).launch() }
    }
}
