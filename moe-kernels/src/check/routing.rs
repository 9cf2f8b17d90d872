//! Routers, and what becomes of their choices.

use super::{argument, shape};
use crate::family::{DropLimit, ExpertGroups, RouteInput, RouteOutput, Scoring, SortOutput};
use crate::{Device, Float, Result, View, ViewMut};

/// Operands of `route`.
pub(crate) fn route<A: Float, D: Device>(
    kernel: &'static str,
    out: &RouteOutput<'_, A, D>,
    input: &RouteInput<'_, A, D>,
    scoring: &Scoring,
) -> Result<()> {
    let ([n, count], [_, k]) = (input.logits.shape(), out.weights.shape());
    shape(kernel, "weights", [n, k], out.weights.shape())?;
    shape(kernel, "experts", [n, k], out.experts.shape())?;
    if let Some(unbiased) = &out.unbiased {
        shape(kernel, "unbiased", [n, k], unbiased.shape())?;
    }
    shape(kernel, "probs", [n, count], out.probs.shape())?;
    shape(kernel, "lse", [1, n], out.lse.shape())?;
    if let Some(margins) = &out.margins {
        shape(kernel, "margins", [1, n], margins.shape())?;
    }
    self::scoring(kernel, scoring, count, k, input.bias.map(|bias| bias.shape()))?;
    if let Some(given) = input.given {
        shape(kernel, "given", [n, k], given.shape())?;
    }
    valid(kernel, input.valid, n)
}

fn valid<D: Device>(kernel: &'static str, valid: Option<View<'_, i32, D>>, n: usize) -> Result<()> {
    valid.map_or(Ok(()), |valid| shape(kernel, "valid", [1, n], valid.shape()))
}

/// Refuses a choice of `k` among so many `experts` that a scoring does not allow, and a bias, of this shape, that it does not take.
fn scoring(
    kernel: &'static str,
    scoring: &Scoring,
    experts: usize,
    k: usize,
    bias: Option<[usize; 2]>,
) -> Result<()> {
    argument(kernel, (1..=experts).contains(&k), || format!("{k} of {experts} experts cannot be chosen"))?;
    if let Some(bias) = bias {
        shape(kernel, "bias", [1, experts], bias)?;
        argument(kernel, scoring.function.is_separate() || scoring.groups.is_none(), || {
            "a softmax takes no bias where there are groups".to_owned()
        })?;
    }
    let Some(ExpertGroups { count, kept, score_top_k }) = scoring.groups else { return Ok(()) };
    let size = experts.checked_div(count).unwrap_or(0);
    let legal = count > 0
        && experts.is_multiple_of(count)
        && (1..=count).contains(&kept)
        && (1..=size).contains(&score_top_k)
        && k <= kept * size;
    argument(kernel, legal, || {
        format!(
            "{k} of {experts} experts cannot be chosen from {kept} of {count} groups by their {score_top_k} best"
        )
    })
}

/// Operands of `softmax_sums`: `[n, E]`, the shape of the logits.
pub(crate) fn softmax_sums<A: Float, D: Device>(
    kernel: &'static str,
    sums: &ViewMut<'_, f64, D>,
    logits: View<'_, A, D>,
    bias: View<'_, A, D>,
    valid: Option<View<'_, i32, D>>,
) -> Result<[usize; 2]> {
    let [n, count] = logits.shape();
    shape(kernel, "sums", [1, count], sums.shape())?;
    shape(kernel, "bias", [1, count], bias.shape())?;
    self::valid(kernel, valid, n)?;
    Ok([n, count])
}

/// Operands of `jitter`.
pub(crate) fn jitter<A: Float, D: Device>(
    kernel: &'static str,
    x: &ViewMut<'_, A, D>,
    tokens: View<'_, i64, D>,
    epsilon: f64,
) -> Result<()> {
    shape(kernel, "tokens", [1, x.shape()[0]], tokens.shape())?;
    argument(kernel, epsilon.is_finite(), || format!("epsilon is {epsilon}"))
}

/// Operands of `route_backward`.
pub(crate) fn route_backward<A: Float, D: Device>(
    kernel: &'static str,
    dlogits: &ViewMut<'_, A, D>,
    dweights: View<'_, A, D>,
    experts: View<'_, i32, D>,
    logits: View<'_, A, D>,
    aux: View<'_, A, D>,
) -> Result<()> {
    let ([n, count], [_, k], [sequences, _]) = (dlogits.shape(), experts.shape(), aux.shape());
    shape(kernel, "dweights", [n, k], dweights.shape())?;
    shape(kernel, "experts", [n, k], experts.shape())?;
    shape(kernel, "logits", [n, count], logits.shape())?;
    shape(kernel, "aux", [sequences.max(1), count], aux.shape())
}

/// Operands of `drop_excess`.
pub(crate) fn drop_excess<A: Float, D: Device>(
    kernel: &'static str,
    kept: &ViewMut<'_, i32, D>,
    experts: View<'_, i32, D>,
    weights: Option<View<'_, A, D>>,
    slots: View<'_, i32, D>,
    limit: DropLimit,
) -> Result<()> {
    let [n, k] = experts.shape();
    shape(kernel, "kept", [n, k], kept.shape())?;
    shape(kernel, "slots", [1, n], slots.shape())?;
    if let Some(weights) = weights {
        shape(kernel, "weights", [n, k], weights.shape())?;
    }
    argument(kernel, limit.unit_slots > 0, || "units without slots".to_owned())
}

/// Operands of `sort_by_expert`: the number of experts.
pub(crate) fn sort_by_expert<D: Device>(
    kernel: &'static str,
    out: &SortOutput<'_, D>,
    experts: View<'_, i32, D>,
    rows_per_expert: Option<usize>,
) -> Result<usize> {
    let [n, k] = experts.shape();
    let entries = out.offsets.shape()[1].max(1);
    shape(kernel, "offsets", [1, entries], out.offsets.shape())?;
    // Saturated, they are more than any operand has.
    let rows = rows_per_expert.map_or(n * k, |rows| rows.saturating_mul(entries - 1));
    shape(kernel, "order", [1, rows], out.order.shape())?;
    shape(kernel, "tokens", [1, rows], out.tokens.shape())?;
    shape(kernel, "position", [n, k], out.position.shape())?;
    argument(kernel, n * k <= i32::MAX as usize, || format!("{n} · {k} choices overflow an i32"))?;
    argument(kernel, rows <= i32::MAX as usize, || format!("{rows} rows overflow an i32"))?;
    Ok(entries - 1)
}
