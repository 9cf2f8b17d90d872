//! Lookup in a block of the vocabulary.

use super::Cuda;
use super::lanes::Lanes;
use super::launch::Launch;
use super::source::EMBEDDING;
use super::vectors::{in_vectors, vector};
use crate::family::Embedding;
use crate::{Device, Float, Result, View, ViewMut, check};

/// Threads of the kernels that look at ids, one each.
const THREADS: usize = 256;
/// Of the kernels: slots of an id, tokens of a chunk, warps of a block of `embed_add`, threads of `embed_order`.
const SLOTS: usize = 16;
const CHUNK: usize = 64;
const WARPS: usize = 8;
const ORDER_THREADS: usize = 1024;
/// Blocks of `embed_order` and of `embed_add`, at most: what a GPU runs at once, and some more of the latter. They go round.
const ORDER_BLOCKS: usize = 264;
const ADD_BLOCKS: usize = 4096;

/// Words of scratch memory that backward takes: `Found` of the kernels.
fn words(rows: usize, n: usize, slices: usize) -> usize {
    let most = n / (SLOTS + 1);
    5 + rows * (1 + SLOTS) + n + 3 * most + n + 2 * (most + n / CHUNK) + most * slices
}

impl<T: Float> Embedding<T> for Cuda {
    fn embed(
        &self,
        mut y: ViewMut<'_, T, Self>,
        table: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
    ) -> Result<()> {
        const KERNEL: &str = "embed";
        let ([n, h], [rows, _]) = (y.shape(), table.shape());
        check::shape(KERNEL, "table", [rows, h], table.shape())?;
        check::shape(KERNEL, "ids", [1, n], ids.shape())?;
        let (name, lanes) = match in_vectors(y.as_view()) && in_vectors(table) {
            true => ("embed", Lanes::of(h / vector::<T>())),
            false => ("embed_any", Lanes::of(h)),
        };
        let launch = self.kernel(&EMBEDDING.of(T::DTYPE), name)?.grid(lanes.grid(n)).block(lanes.block());
        let launch = launch.mat_mut(&mut y).mat(table).vector(ids).size(first).size(rows);
        // SAFETY: the kernel writes `n` rows of `h` elements and reads only rows of the table.
        unsafe { launch.size(n).size(h).launch() }
    }

    fn embed_backward(
        &self,
        mut dtable: ViewMut<'_, T::Acc, Self>,
        dy: View<'_, T, Self>,
        ids: View<'_, i32, Self>,
        first: usize,
        padding_idx: Option<usize>,
    ) -> Result<()> {
        const KERNEL: &str = "embed_backward";
        let ([n, h], [rows, _]) = (dy.shape(), dtable.shape());
        check::shape(KERNEL, "dtable", [rows, h], dtable.shape())?;
        check::shape(KERNEL, "ids", [1, n], ids.shape())?;
        check::argument(KERNEL, i32::try_from(n).is_ok(), || format!("{n} tokens are more than 2^31 - 1"))?;
        if n == 0 || h == 0 || rows == 0 {
            return Ok(());
        }
        // No token has a negative id.
        let padding = padding_idx.and_then(|id| i64::try_from(id).ok()).unwrap_or(-1);
        let (name, elements) = match in_vectors(dtable.as_view()) && in_vectors(dy) {
            true => ("embed_add", vector::<T>()),
            false => ("embed_add_any", 1),
        };
        let slices = h.div_ceil(elements * 32);
        let scratch = self.alloc(words(rows, n, slices) * size_of::<i32>())?;
        let begin = |name, grid, threads| -> Result<Launch<'_>> {
            Ok(self.kernel(&EMBEDDING.of(T::DTYPE), name)?.grid([grid, 1, 1]).block([threads, 1, 1]))
        };
        let of_tokens = n.div_ceil(THREADS);
        let launch = begin("embed_clear", of_tokens, THREADS)?.scratch(&scratch).vector(ids);
        // SAFETY: the kernel reads `n` ids and writes counts of those among the `rows`.
        unsafe { launch.size(first).size(rows).size(n).launch()? };
        let launch = begin("embed_count", of_tokens, THREADS)?.scratch(&scratch).vector(ids);
        // SAFETY: as above; it also writes slots of those ids, and no more of `distinct` and of `many` than there can be.
        unsafe { launch.size(first).size(rows).size(n).value(padding).launch()? };

        // An id of many tokens has more than its slots; one of several chunks has more than one of them.
        let most = n / (SLOTS + 1);
        let launch = begin("embed_order", most.min(ORDER_BLOCKS), ORDER_THREADS)?.scratch(&scratch);
        let launch = launch.vector(ids).size(first).size(rows).size(n);
        // SAFETY: the kernel reads `n` ids, and writes `members`, no more than there are tokens, and what is known of ids of many
        // tokens and of their chunks.
        unsafe { launch.size(slices).launch()? };
        let partial = self.alloc(2 * (n / CHUNK) * h * size_of::<T::Acc>())?;
        let down = (n + most + n / CHUNK).div_ceil(WARPS).min(ADD_BLOCKS.div_ceil(slices));
        let launch = begin(name, slices, WARPS * 32)?.grid([slices, down, 1]);
        let launch = launch.mat_mut(&mut dtable).mat(dy).scratch(&partial).scratch(&scratch);
        // SAFETY: the kernel reads rows of `dy` that are tokens, and writes rows of `dtable` that ids name, each piece of one by one
        // warp; both have `h` elements. Sums of chunks are kept for ids of more than one: fewer than twice the whole chunks of tokens.
        unsafe { launch.size(rows).size(n).size(h).launch() }
    }
}
