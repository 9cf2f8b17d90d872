//! A comparison in text.

use std::fmt;

use super::{Comparison, TensorDiff, TensorKind};

/// [`Comparison::table`].
#[derive(Debug, Clone, Copy)]
pub struct Table<'a> {
    pub(super) comparison: &'a Comparison,
    pub(super) tolerance: f64,
    pub(super) limit: usize,
}

const HEAD: [&str; 8] = ["", "tensor", "type and shape", "max abs", "relative", "at", "A", "B"];

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Table { comparison: Comparison { tensors, only_a, only_b }, tolerance, limit } = *self;
        let differing: Vec<&TensorDiff> = tensors.iter().filter(|tensor| !tensor.identical).collect();
        let rows = differing.iter().take(limit).map(|tensor| row(tensor, tolerance));
        let rows: Vec<[String; 8]> = [HEAD.map(str::to_owned)].into_iter().chain(rows).collect();
        if rows.len() > 1 {
            let widths: Vec<usize> = (0..HEAD.len())
                .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
                .collect();
            for row in &rows {
                let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
                writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
            }
        }
        if differing.len() > limit {
            writeln!(f, "… and {} more that are not identical", differing.len() - limit)?;
        }
        for (side, names) in [("A", only_a), ("B", only_b)] {
            for name in names.iter().take(limit) {
                writeln!(f, "! only in {side}: {name}")?;
            }
            if names.len() > limit {
                writeln!(f, "… and {} more that are only in {side}", names.len() - limit)?;
            }
        }
        let beyond = tensors.iter().filter(|tensor| !tensor.within(tolerance)).count();
        writeln!(
            f,
            "{} identical, {} within {tolerance:e}, {beyond} beyond, {} only in A, {} only in B",
            tensors.len() - differing.len(),
            differing.len() - beyond,
            only_a.len(),
            only_b.len()
        )
    }
}

fn row(tensor: &TensorDiff, tolerance: f64) -> [String; 8] {
    let TensorDiff { name, a, b, worst, .. } = tensor;
    let mark = if tensor.within(tolerance) { "" } else { "!" };
    let [max_abs, relative, at, value_a, value_b] = match worst {
        None => ["–"; 5].map(str::to_owned),
        Some(worst) => [
            format!("{:.2e}", worst.max_abs),
            format!("{:.2e}", worst.relative),
            format!("{:?}", worst.at),
            format!("{:?}", worst.values[0]),
            format!("{:?}", worst.values[1]),
        ],
    };
    [mark.to_owned(), name.clone(), kinds(a, b), max_abs, relative, at, value_a, value_b]
}

fn kinds(a: &TensorKind, b: &TensorKind) -> String {
    let dtypes = if a.dtype == b.dtype { a.dtype.to_string() } else { format!("{}/{}", a.dtype, b.dtype) };
    match a.shape == b.shape {
        true => format!("{dtypes} {:?}", a.shape),
        false => format!("{dtypes} {:?}/{:?}", a.shape, b.shape),
    }
}
