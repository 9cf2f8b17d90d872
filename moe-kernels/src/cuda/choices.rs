//! What becomes of choices of experts: dropped or kept, and sorted.

use super::Cuda;
use super::fault::Fault;
use super::launch::blocks;
use super::source::CHOICES;
use crate::family::{DropLimit, SortOutput};
use crate::{Device, Float, Result, Tensor, View, ViewMut, check};

/// Blocks of a sort: each looks at the counts of all, so no more than run at once.
const SORT_BLOCKS: usize = 128;
/// Choices of a block, at least; and its warps, at most.
const SORT_CHOICES: usize = 2048;
const SORT_WARPS: usize = 16;
/// Integers that a sort may have in shared memory (48 KiB, or all that every GPU has for an unusual number of experts).
const SHARED: usize = 12 << 10;
const MOST_SHARED: usize = 24 << 10;
/// Threads of a block that drops: `DROP_THREADS` of the kernel.
const DROP_THREADS: usize = 1024;

/// What a sort writes: [`SortOutput`], tokens only if they are asked for.
struct Sorted<'a> {
    order: ViewMut<'a, i32, Cuda>,
    tokens: Option<ViewMut<'a, i32, Cuda>>,
    position: ViewMut<'a, i32, Cuda>,
    offsets: ViewMut<'a, i32, Cuda>,
}

impl Cuda {
    /// The stable sort of operands of the right shapes.
    fn sort(
        &self,
        kernel: &'static str,
        out: Sorted<'_>,
        experts: View<'_, i32, Self>,
        rows_per_expert: Option<usize>,
    ) -> Result<()> {
        let Sorted { mut order, mut tokens, mut position, mut offsets } = out;
        let ([n, k], [_, rows]) = (experts.shape(), order.shape());
        let num_experts = offsets.shape()[1] - 1;
        let warps = (SHARED / num_experts.max(1)).saturating_sub(2).clamp(1, SORT_WARPS);
        let integers = (2 + warps) * num_experts;
        check::argument(kernel, integers <= MOST_SHARED, || {
            format!("{num_experts} experts; the device sorts by at most {}", MOST_SHARED / 3)
        })?;
        let each = (n * k).div_ceil(SORT_BLOCKS).max(SORT_CHOICES);
        let blocks = (n * k).div_ceil(each).max(1);
        let counts = self.alloc(blocks * num_experts * size_of::<i32>())?;
        // Which type is theirs does not matter to integers.
        let variant = CHOICES.of(crate::DType::F32);
        let launch = self.kernel(&variant, "sort_count")?.scratch(&counts).mat(experts);
        let launch = launch.value(k as u32).size(n * k).size(each).value(num_experts as i32);
        let launch = launch.fault(Fault::Index { what: "expert", end: num_experts });
        let launch =
            launch.grid([blocks, 1, 1]).block([warps * 32, 1, 1]).shared(num_experts * size_of::<i32>());
        // SAFETY: each block reads its choices, which lie in `experts`, and writes a row of counts.
        unsafe { launch.launch()? };
        let launch = self.kernel(&variant, "sort_place")?.vector_mut(&mut order);
        let launch = launch.vector_mut_or_null(tokens.as_mut()).mat_mut(&mut position);
        let launch = launch.vector_mut(&mut offsets).scratch(&counts).mat(experts);
        let launch = launch.value(k as u32).size(n * k).size(each).value(num_experts as i32).size(rows);
        let launch = launch.value(rows_per_expert.map_or(-1, |rows| rows as i64));
        let launch =
            launch.fault(Fault::Argument { what: "an expert has more choices than it has room for" });
        let launch =
            launch.grid([blocks, 1, 1]).block([warps * 32, 1, 1]).shared(integers * size_of::<i32>());
        // SAFETY: as above; every choice has a row of its own below `rows`, and those without a row are skipped.
        unsafe { launch.launch() }
    }

    /// [`Routing::sort_by_expert`](crate::family::Routing::sort_by_expert).
    pub(super) fn sorted_by_expert(
        &self,
        out: SortOutput<'_, Self>,
        experts: View<'_, i32, Self>,
        rows_per_expert: Option<usize>,
    ) -> Result<()> {
        const KERNEL: &str = "sort_by_expert";
        check::sort_by_expert(KERNEL, &out, experts, rows_per_expert)?;
        let SortOutput { order, tokens, position, offsets } = out;
        self.sort(KERNEL, Sorted { order, tokens: Some(tokens), position, offsets }, experts, rows_per_expert)
    }

    /// [`Routing::drop_excess`](crate::family::Routing::drop_excess): choices are sorted by expert, and of each
    /// expert the last one that stays is looked for.
    pub(super) fn without_excess<T: Float>(
        &self,
        mut kept: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
        weights: Option<View<'_, T, Self>>,
        slots: View<'_, i32, Self>,
        limit: DropLimit,
    ) -> Result<()> {
        const KERNEL: &str = "drop_excess";
        let DropLimit { num_experts, unit_slots, capacity } = limit;
        let [n, k] = experts.shape();
        check::drop_excess(KERNEL, &kept, experts, weights, slots, limit)?;
        check::argument(KERNEL, n * k <= i32::MAX as usize, || format!("{n} · {k} choices overflow an i32"))?;
        if n * k == 0 {
            return Ok(());
        }
        let mut order = Tensor::<i32, Self>::uninit(self, 1, n * k)?;
        let mut offsets = Tensor::<i32, Self>::uninit(self, 1, num_experts + 1)?;
        // What is routed nowhere is −1 by this already; the rest is written below.
        let position = kept.reborrow();
        let out = Sorted { order: order.view_mut()?, tokens: None, position, offsets: offsets.view_mut()? };
        self.sort(KERNEL, out, experts, None)?;
        let keys = self.alloc(n * k * size_of::<T>())?;
        let places = self.alloc(n * k * size_of::<u32>())?;
        let launch = self.kernel(&CHOICES.of(T::DTYPE), KERNEL)?.mat_mut(&mut kept);
        let launch = launch.scratch(&keys).scratch(&places);
        let launch = launch.vector(order.view()).vector(offsets.view()).mat_or_null(weights).vector(slots);
        // All slots are below 2^31: so large a unit has all of them.
        let unit_slots = unit_slots.min(1 << 31) as u32;
        let launch = launch.value(k as u32).size(n).value(num_experts as i32).value(unit_slots);
        let launch = launch.value(i64::try_from(capacity).unwrap_or(i64::MAX)).fault(Fault::NotANumber);
        let launch = launch.fault(Fault::Argument { what: "a slot is negative" });
        let grid = blocks(num_experts.max(1), 1);
        // SAFETY: `order` holds choices of `kept`, as the sort before leaves it, and `offsets` lie inside it; `keys` and
        // `places` have as many elements.
        unsafe { launch.grid(grid).block([DROP_THREADS, 1, 1]).launch() }
    }
}
