//! Router scores, choice and sorting.

use super::Cuda;
use super::fault::Fault;
use super::launch::blocks;
use super::source::ROUTING;
use super::tiles::Tiles;
use crate::family::{
    DropLimit, Reduce, RouteInput, RouteOutput, Routing, ScoreFunction, Scoring, SortOutput,
};
use crate::{Device, Float, Layout, Result, View, ViewMut, check};

/// Warps of a block, at most.
const WARPS: usize = 8;
/// Shared memory of a block of several warps, and of one for an unusual number of experts.
const SHARED: usize = 48 << 10;
const MOST_SHARED: usize = 96 << 10;
/// Blocks that sum softmaxes, and tokens of one, at least.
const SUM_BLOCKS: usize = 528;
const SUM_TOKENS: usize = 16;

const NO_EXPERT: Fault = Fault::Argument { what: "a chosen expert is negative or none of the experts" };

/// Warps of a block, of which each has so many bytes of shared memory.
fn warps(kernel: &'static str, num_experts: usize, bytes: usize) -> Result<usize> {
    check::argument(kernel, bytes <= MOST_SHARED, || {
        format!(
            "{num_experts} experts need {bytes} bytes for a token; a block of the device has {MOST_SHARED}"
        )
    })?;
    Ok((SHARED / bytes.max(1)).clamp(1, WARPS))
}

/// `Scoring` of the kernels.
fn scoring_argument(num_experts: usize, k: usize, scoring: &Scoring) -> [i32; 8] {
    let (score, normalize, by_logits) = match scoring.function {
        ScoreFunction::SoftmaxPost => (0, true, true),
        ScoreFunction::SoftmaxPre { normalize } => (0, normalize, false),
        ScoreFunction::Sigmoid { normalize } => (1, normalize, false),
        ScoreFunction::SqrtSoftplus { normalize } => (2, normalize, false),
    };
    let (groups, kept, score_top_k) =
        scoring.groups.map_or((0, 0, 0), |groups| (groups.count, groups.kept, groups.score_top_k));
    let sizes = [num_experts, k, groups, kept, score_top_k].map(|size| size as i32);
    let [num_experts, k, groups, kept, score_top_k] = sizes;
    [num_experts, k, groups, kept, score_top_k, score, i32::from(normalize), i32::from(by_logits)]
}

impl<A: Float<Acc = A>> Routing<A> for Cuda {
    fn route(
        &self,
        out: RouteOutput<'_, A, Self>,
        input: RouteInput<'_, A, Self>,
        scoring: &Scoring,
    ) -> Result<()> {
        const KERNEL: &str = "route";
        check::route(KERNEL, &out, &input, scoring)?;
        let RouteInput { logits, bias, given, valid } = input;
        let RouteOutput { mut weights, mut experts, mut unbiased, mut probs, mut lse, mut margins } = out;
        let [n, count] = logits.shape();
        let [_, k] = weights.shape();
        let size = size_of::<A>();
        let groups = scoring.groups.map_or(0, |groups| groups.count);
        let bytes = (2 * count + groups) * size + (k * size_of::<i32>()).next_multiple_of(size);
        let warps = warps(KERNEL, count, bytes)?;
        let launch = self.kernel(&ROUTING.of(A::DTYPE), KERNEL)?;
        let launch = launch.mat_mut(&mut weights).mat_mut(&mut experts).mat_mut_or_null(unbiased.as_mut());
        let launch = launch.mat_mut(&mut probs).vector_mut(&mut lse).vector_mut_or_null(margins.as_mut());
        let launch = launch.mat(logits).vector_or_null(bias).mat_or_null(given).vector_or_null(valid);
        let launch = launch.size(n).value(scoring_argument(count, k, scoring)).acc::<A>(scoring.scale);
        let launch = launch.fault(Fault::NotANumber).fault(NO_EXPERT);
        let launch = launch.grid(blocks(n, warps)).block([32, warps, 1]).shared(warps * bytes);
        // SAFETY: operands have the shapes that the kernel takes them for; a given choice that is none of the experts is not
        // followed.
        unsafe { launch.launch() }
    }

    fn softmax_sums(
        &self,
        sums: ViewMut<'_, f64, Self>,
        logits: View<'_, A, Self>,
        bias: View<'_, A, Self>,
        valid: Option<View<'_, i32, Self>>,
    ) -> Result<()> {
        const KERNEL: &str = "softmax_sums";
        let [n, count] = check::softmax_sums(KERNEL, &sums, logits, bias, valid)?;
        let bytes = count * (size_of::<f64>() + size_of::<A>());
        let warps = warps(KERNEL, count, bytes)?;
        let each = n.div_ceil(SUM_BLOCKS).max(SUM_TOKENS);
        let blocks = n.div_ceil(each);
        let parts = self.alloc(blocks * count * size_of::<f64>())?;
        let launch = self.kernel(&ROUTING.of(A::DTYPE), KERNEL)?.scratch(&parts).mat(logits).vector(bias);
        let launch =
            launch.vector_or_null(valid).size(n).value(count as i32).size(each).fault(Fault::NotANumber);
        let launch = launch.grid([blocks, 1, 1]).block([32, warps, 1]).shared(warps * bytes);
        // SAFETY: a block reads its rows, of which there are `n`, and writes a row of `count` parts.
        unsafe { launch.launch()? };
        let parts = View::<f64, Self>::new(&parts, Layout::contiguous(blocks, count))?;
        Reduce::<f64>::column_sums(self, sums, parts)
    }

    fn jitter(
        &self,
        mut x: ViewMut<'_, A, Self>,
        tokens: View<'_, i64, Self>,
        key: u64,
        epsilon: f64,
    ) -> Result<()> {
        const KERNEL: &str = "jitter";
        check::jitter(KERNEL, &x, tokens, epsilon)?;
        // Pairs of columns, of two rows.
        let tiles = Tiles::new(x.shape(), 2, 2).with_other(x.as_view());
        let launch = tiles.mat_mut(self.kernel(&ROUTING.of(A::DTYPE), KERNEL)?, &mut x);
        let launch = launch.vector(tokens).value(key).value(epsilon);
        // SAFETY: the kernel touches the elements of `x` and reads as many tokens as it has rows.
        unsafe { tiles.argument(launch).launch() }
    }

    fn route_backward(
        &self,
        mut dlogits: ViewMut<'_, A, Self>,
        dweights: View<'_, A, Self>,
        experts: View<'_, i32, Self>,
        logits: View<'_, A, Self>,
        scoring: &Scoring,
        aux: View<'_, A, Self>,
        z: f64,
    ) -> Result<()> {
        const KERNEL: &str = "route_backward";
        check::route_backward(KERNEL, &dlogits, dweights, experts, logits, aux)?;
        let ([n, count], [_, k], [sequences, _]) = (dlogits.shape(), experts.shape(), aux.shape());
        let size = size_of::<A>();
        let arrays = if scoring.function.is_separate() { 3 } else { 1 };
        let bytes = (arrays * count + k) * size + (k * size_of::<i32>()).next_multiple_of(size);
        let warps = warps(KERNEL, count, bytes)?;
        let launch = self.kernel(&ROUTING.of(A::DTYPE), KERNEL)?.mat_mut(&mut dlogits);
        let launch = launch.mat(dweights).mat(experts).mat(logits).mat(aux).size(sequences).size(n);
        let launch =
            launch.value(scoring_argument(count, k, scoring)).acc::<A>(scoring.scale).acc::<A>(2.0 * z);
        let launch = launch.fault(NO_EXPERT);
        let launch = launch.grid(blocks(n, warps)).block([32, warps, 1]).shared(warps * bytes);
        // SAFETY: operands have the shapes that the kernel takes them for; a choice that is none of the experts is not
        // followed.
        unsafe { launch.launch() }
    }

    fn drop_excess(
        &self,
        kept: ViewMut<'_, i32, Self>,
        experts: View<'_, i32, Self>,
        weights: Option<View<'_, A, Self>>,
        slots: View<'_, i32, Self>,
        limit: DropLimit,
    ) -> Result<()> {
        self.without_excess(kept, experts, weights, slots, limit)
    }

    fn sort_by_expert(
        &self,
        out: SortOutput<'_, Self>,
        experts: View<'_, i32, Self>,
        rows_per_expert: Option<usize>,
    ) -> Result<()> {
        self.sorted_by_expert(out, experts, rows_per_expert)
    }
}
