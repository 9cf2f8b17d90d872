//! Load balance.

use super::{argument, shape};
use crate::family::{BalanceInput, BalanceTerm, BalanceTerms};
use crate::{Device, Float, Result, View, ViewMut};

/// An error unless these are counts of at least one sequence; the number of sequences and of experts.
fn counts(kernel: &'static str, what: &'static str, got: [usize; 2]) -> Result<[usize; 2]> {
    let [sequences, width] = got;
    argument(kernel, sequences > 0 && width > 0, || format!("{what} are {sequences} × {width}"))?;
    Ok([sequences, width - 1])
}

/// An error unless these are counts of so many sequences and experts.
fn counts_of(
    kernel: &'static str,
    what: &'static str,
    [sequences, experts]: [usize; 2],
    got: [usize; 2],
) -> Result<()> {
    counts(kernel, what, got)?;
    shape(kernel, what, [sequences, experts + 1], got)
}

/// Operands of `count_choices`: the number of sequences and of experts.
pub(crate) fn count_choices<D: Device>(
    kernel: &'static str,
    counts: &ViewMut<'_, i64, D>,
) -> Result<[usize; 2]> {
    self::counts(kernel, "counts", counts.shape())
}

/// Operands of `count_dropped`: the shape of the choices.
pub(crate) fn count_dropped<D: Device>(
    kernel: &'static str,
    dropped: &ViewMut<'_, f64, D>,
    experts: View<'_, i32, D>,
    kept: View<'_, i32, D>,
) -> Result<[usize; 2]> {
    shape(kernel, "dropped", [1, 1], dropped.shape())?;
    shape(kernel, "kept", experts.shape(), kept.shape())?;
    Ok(experts.shape())
}

/// Operands of `sum_counts`: the number of sequences and of experts.
pub(crate) fn sum_counts<D: Device>(
    kernel: &'static str,
    sums: &ViewMut<'_, i64, D>,
    counts: View<'_, i64, D>,
) -> Result<[usize; 2]> {
    let [sequences, experts] = self::counts(kernel, "counts", counts.shape())?;
    shape(kernel, "sums", [1, experts], sums.shape())?;
    Ok([sequences, experts])
}

/// Operands of `balance_sums`: the number of sequences and of experts.
pub(crate) fn balance_sums<A: Float, D: Device>(
    kernel: &'static str,
    sums: &ViewMut<'_, f64, D>,
    input: &BalanceInput<'_, A, D>,
) -> Result<[usize; 2]> {
    let [sequences, experts] = input.probs.shape();
    shape(kernel, "sums", [1, 3 * experts + 2], sums.shape())?;
    counts_of(kernel, "own", [sequences, experts], input.own.shape())?;
    counts_of(kernel, "unit", [sequences, experts], input.unit.shape())?;
    if let Some(chosen) = input.chosen {
        counts_of(kernel, "chosen", [1, experts], chosen.shape())?;
    }
    argument(kernel, input.top_k > 0, || "no choices".to_owned())?;
    Ok([sequences, experts])
}

/// Operands of `balance_gradient`: the number of sequences and of experts.
pub(crate) fn balance_gradient<A: Float, D: Device>(
    kernel: &'static str,
    gradient: &ViewMut<'_, A, D>,
    terms: &BalanceTerms<'_, D>,
) -> Result<[usize; 2]> {
    let [sequences, experts] = gradient.shape();
    counts_of(kernel, "unit", [sequences, experts], terms.unit.shape())?;
    for (what, term) in [("counts of the step", terms.step), ("counts of the model", terms.model)] {
        term.map_or(Ok(()), |term| shape(kernel, what, [1, experts], term.counts.shape()))?;
    }
    Ok([sequences, experts])
}

/// Operands of `balance_dot`: the number of sequences and of experts.
pub(crate) fn balance_dot<A: Float, D: Device>(
    kernel: &'static str,
    sum: &ViewMut<'_, f64, D>,
    probs: View<'_, A, D>,
    unit: View<'_, i64, D>,
    term: &BalanceTerm<'_, D>,
) -> Result<[usize; 2]> {
    let [sequences, experts] = probs.shape();
    shape(kernel, "sum", [1, 1], sum.shape())?;
    counts_of(kernel, "unit", [sequences, experts], unit.shape())?;
    shape(kernel, "counts", [1, experts], term.counts.shape())?;
    Ok([sequences, experts])
}
