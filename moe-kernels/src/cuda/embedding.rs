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
/// Of the kernels: slots of an id, warps of a block of `embed_add`, threads of `embed_order`.
const SLOTS: usize = 16;
const WARPS: usize = 8;
const ORDER_THREADS: usize = 1024;
/// Blocks of `embed_add` that work on ids of many tokens, at most: what a GPU runs at once, and then some.
const MANY_BLOCKS: usize = 2048;

/// Words of scratch memory that backward takes: `Found` of the kernels.
fn words(rows: usize, n: usize) -> usize {
    2 + rows * (1 + SLOTS) + 2 * (n / (SLOTS + 1)) + n
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
        let scratch = self.alloc(words(rows, n) * size_of::<i32>())?;
        let begin = |name, grid, threads| -> Result<Launch<'_>> {
            Ok(self.kernel(&EMBEDDING.of(T::DTYPE), name)?.grid(grid).block([threads, 1, 1]))
        };
        let of_tokens = [n.div_ceil(THREADS), 1, 1];
        let launch = begin("embed_clear", of_tokens, THREADS)?.scratch(&scratch).vector(ids);
        // SAFETY: the kernel reads `n` ids and writes counts of those among the `rows`.
        unsafe { launch.size(first).size(rows).size(n).launch()? };
        let launch = begin("embed_count", of_tokens, THREADS)?.scratch(&scratch).vector(ids);
        // SAFETY: as above; it also writes slots of those ids, and no more of `many` than there can be.
        unsafe { launch.size(first).size(rows).size(n).value(padding).launch()? };

        // An id of many tokens has more than its slots.
        let most = n / (SLOTS + 1);
        let launch = begin("embed_order", [most, 1, 1], ORDER_THREADS)?.scratch(&scratch).vector(ids);
        // SAFETY: the kernel reads `n` ids, and writes `members`, no more than there are tokens.
        unsafe { launch.size(first).size(rows).size(n).launch()? };
        let (name, elements) = match in_vectors(dtable.as_view()) && in_vectors(dy) {
            true => ("embed_add", vector::<T>()),
            false => ("embed_add_any", 1),
        };
        let many = (most * h.div_ceil(elements * 32)).min(MANY_BLOCKS);
        let launch = begin(name, [many + n.div_ceil(WARPS), 1, 1], WARPS * 32)?.mat_mut(&mut dtable).mat(dy);
        let launch = launch.scratch(&scratch).vector(ids).size(first).size(rows).size(n);
        // SAFETY: the kernel reads rows of `dy` that are tokens, and writes rows of `dtable` that ids name, each piece of one in
        // one warp or block; both have `h` elements.
        unsafe { launch.value(padding).size(h).size(many).launch() }
    }
}
