//! How often experts are chosen, and the losses made of that.

use super::Cuda;
use super::fault::Fault;
use super::launch::Launch;
use super::source::BALANCE;
use crate::family::{Balance, BalanceInput, BalanceTerm, BalanceTerms};
use crate::{Device, Float, Result, View, ViewMut, check};

/// Threads of a block.
const THREADS: usize = 256;
/// Blocks that count, at most: each adds its counts to those of all.
const BLOCKS: usize = 132;
/// Counts that a block may have in shared memory (48 KiB).
const SHARED: usize = 12 << 10;

/// `Term` of the kernels.
fn term<'a>(launch: Launch<'a>, term: Option<BalanceTerm<'_, Cuda>>) -> Launch<'a> {
    let Some(BalanceTerm { counts, factor, per_token }) = term else { return launch.value([0u64; 3]) };
    let address = counts.buf().address() + (counts.layout().offset * size_of::<i64>()) as u64;
    launch.uses(counts.buf()).value([address, factor.to_bits(), u64::from(per_token)])
}

impl<A: Float<Acc = A>> Balance<A> for Cuda {
    fn count_choices(&self, mut counts: ViewMut<'_, i64, Self>, experts: View<'_, i32, Self>) -> Result<()> {
        const KERNEL: &str = "count_choices";
        let [sequences, num_experts] = check::count_choices(KERNEL, &counts)?;
        let ([n, k], all) = (experts.shape(), sequences * (num_experts + 1));
        let shared = if all <= SHARED { all * size_of::<u32>() } else { 0 };
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.mat_mut(&mut counts).mat(experts);
        let launch = launch.size(n).value(k as i32).size(sequences).value(num_experts as i32);
        let launch = launch.value(i32::from(shared > 0));
        let launch = launch.fault(Fault::Index { what: "expert", end: num_experts });
        let grid = [n.div_ceil(THREADS).min(BLOCKS), 1, 1];
        // SAFETY: the kernel reads `n · k` experts, and follows those alone that are below `num_experts`.
        unsafe { launch.grid(grid).block([THREADS, 1, 1]).shared(shared).launch() }
    }

    fn count_dropped(
        &self,
        mut dropped: ViewMut<'_, f64, Self>,
        experts: View<'_, i32, Self>,
        kept: View<'_, i32, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "count_dropped";
        let [n, k] = check::count_dropped(KERNEL, &dropped, experts, kept)?;
        let counters = self.alloc_zeroed(2 * size_of::<u64>())?;
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.vector_mut(&mut dropped).scratch(&counters);
        let launch = launch.mat(experts).mat(kept).size(n).size(k);
        let grid = [(n * k).div_ceil(THREADS).min(BLOCKS), 1, 1];
        // SAFETY: both matrices are of `n · k` elements; one number is written, and two are counters.
        unsafe { launch.grid(grid).block([THREADS, 1, 1]).launch() }
    }

    fn sum_counts(&self, mut sums: ViewMut<'_, i64, Self>, counts: View<'_, i64, Self>) -> Result<()> {
        const KERNEL: &str = "sum_counts";
        let [sequences, num_experts] = check::sum_counts(KERNEL, &sums, counts)?;
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.vector_mut(&mut sums);
        let launch = launch.mat(counts).size(sequences).value(num_experts as i32);
        // SAFETY: a thread has one of `num_experts` columns.
        unsafe { launch.grid([num_experts.div_ceil(THREADS), 1, 1]).block([THREADS, 1, 1]).launch() }
    }

    fn balance_sums(&self, mut sums: ViewMut<'_, f64, Self>, input: BalanceInput<'_, A, Self>) -> Result<()> {
        const KERNEL: &str = "balance_sums";
        let [sequences, num_experts] = check::balance_sums(KERNEL, &sums, &input)?;
        let BalanceInput { own, unit, chosen, probs, top_k } = input;
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.vector_mut(&mut sums);
        let launch = launch.mat(own).mat(unit).vector_or_null(chosen).mat(probs);
        let launch = launch.size(sequences).value(num_experts as i32);
        let launch = launch.value(num_experts as f64 / top_k as f64);
        // SAFETY: operands have the shapes that the kernel takes them for.
        unsafe { launch.block([THREADS, 1, 1]).launch() }
    }

    fn balance_gradient(
        &self,
        mut gradient: ViewMut<'_, A, Self>,
        terms: BalanceTerms<'_, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "balance_gradient";
        let [sequences, num_experts] = check::balance_gradient(KERNEL, &gradient, &terms)?;
        let BalanceTerms { unit, micro_batch, sequence, step, model } = terms;
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.mat_mut(&mut gradient).mat(unit);
        let launch = launch.size(sequences).value(num_experts as i32).value(micro_batch).value(sequence);
        let launch = term(term(launch, step), model);
        let blocks = (sequences * num_experts).div_ceil(THREADS).min(BLOCKS);
        // SAFETY: operands have the shapes that the kernel takes them for.
        unsafe { launch.grid([blocks, 1, 1]).block([THREADS, 1, 1]).launch() }
    }

    fn balance_dot(
        &self,
        mut sum: ViewMut<'_, f64, Self>,
        probs: View<'_, A, Self>,
        unit: View<'_, i64, Self>,
        of: BalanceTerm<'_, Self>,
    ) -> Result<()> {
        const KERNEL: &str = "balance_dot";
        let [sequences, num_experts] = check::balance_dot(KERNEL, &sum, probs, unit, &of)?;
        let launch = self.kernel(&BALANCE.of(A::DTYPE), KERNEL)?.vector_mut(&mut sum).mat(probs).mat(unit);
        let launch = term(launch.size(sequences).value(num_experts as i32), Some(of));
        // SAFETY: operands have the shapes that the kernel takes them for.
        unsafe { launch.block([THREADS, 1, 1]).launch() }
    }
}
