//! Two sets of tensors, number by number: safetensors files, folders of the hub, or checkpoints.
//!
//! ```no_run
//! use moe_train::diff::{Tensors, compare};
//!
//! let (a, b) = (Tensors::open("trace.safetensors".as_ref())?, Tensors::open("golden.safetensors".as_ref())?);
//! let comparison = compare(&a, &b)?;
//! print!("{}", comparison.table(1e-9, 20));
//! assert_eq!(comparison.differing(1e-9), 0);
//! # Ok::<(), moe_train::Error>(())
//! ```

mod element;
mod error;
mod source;
mod table;

pub use error::DiffError;
pub use source::{TensorKind, Tensors};
pub use table::Table;

use crate::Result;

/// How two sets of tensors differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Tensors that both have, the worst first.
    pub tensors: Vec<TensorDiff>,
    /// Names that only the first has.
    pub only_a: Vec<String>,
    /// Names that only the second has.
    pub only_b: Vec<String>,
}

/// How a tensor differs between two sets.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// Type and shape in the first set.
    pub a: TensorKind,
    /// The same in the second.
    pub b: TensorKind,
    /// Whether types, shapes and all bits are the same.
    pub identical: bool,
    /// The largest difference; none if shapes differ, if there is no element, or if elements are no numbers.
    pub worst: Option<Worst>,
}

/// The largest difference between elements of two tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Worst {
    /// `max|a−b|`. A number beside what is none (NaN) differs infinitely; two that are none do not.
    pub max_abs: f64,
    /// That in multiples of the largest finite `|b|`; 0 where both are.
    pub relative: f64,
    /// The index of the first element that differs so much.
    pub at: Vec<usize>,
    /// Its values in the first and second set.
    pub values: [f64; 2],
}

impl TensorDiff {
    /// Whether the tensors are as good as equal: to the bit, where the tolerance is 0; else where the largest difference is at
    /// most so much of the largest `|b|`, in whatever types.
    pub fn within(&self, tolerance: f64) -> bool {
        let close = |worst: &Worst| tolerance > 0.0 && worst.relative <= tolerance;
        self.identical || self.worst.as_ref().is_some_and(close)
    }

    /// What is sorted by: shapes and elements that cannot be compared before all numbers.
    fn badness(&self) -> (bool, f64, f64) {
        let [relative, max_abs] =
            self.worst.as_ref().map_or([0.0; 2], |worst| [worst.relative, worst.max_abs]);
        (!self.identical && self.worst.is_none(), relative, max_abs)
    }
}

impl Comparison {
    /// Tensors that differ by more than `tolerance` ([`TensorDiff::within`]) or that one side lacks.
    pub fn differing(&self, tolerance: f64) -> usize {
        let differing = self.tensors.iter().filter(|tensor| !tensor.within(tolerance)).count();
        differing + self.only_a.len() + self.only_b.len()
    }

    /// For people: at most `limit` tensors that are not identical, the worst first, and a summary.
    pub fn table(&self, tolerance: f64, limit: usize) -> Table<'_> {
        Table { comparison: self, tolerance, limit }
    }
}

/// Compares tensors of the same name. No more than a block of each side is in memory, of a checkpoint a tensor.
///
/// # Errors
/// Something cannot be read.
pub fn compare(a: &Tensors, b: &Tensors) -> Result<Comparison> {
    let only = |here: &Tensors, there: &Tensors| {
        here.names().filter(|name| there.kind(name).is_none()).map(str::to_owned).collect()
    };
    let (only_a, only_b) = (only(a, b), only(b, a));
    let mut tensors = Vec::new();
    for name in a.names() {
        if let (Some(kind_a), Some(kind_b)) = (a.kind(name), b.kind(name)) {
            tensors.push(compare_tensor(name, (a, kind_a), (b, kind_b))?);
        }
    }
    tensors.sort_by(|x: &TensorDiff, y: &TensorDiff| {
        let ((hard_x, relative_x, abs_x), (hard_y, relative_y, abs_y)) = (x.badness(), y.badness());
        hard_y
            .cmp(&hard_x)
            .then(relative_y.total_cmp(&relative_x))
            .then(abs_y.total_cmp(&abs_x))
            .then(x.identical.cmp(&y.identical))
    });
    Ok(Comparison { tensors, only_a, only_b })
}

fn compare_tensor(
    name: &str,
    (a, kind_a): (&Tensors, &TensorKind),
    (b, kind_b): (&Tensors, &TensorKind),
) -> Result<TensorDiff> {
    let identical = kind_a == kind_b && same_bytes(name, a, b)?;
    let worst = match identical || kind_a.shape != kind_b.shape {
        true => None,
        false => worst(name, (a, kind_a), (b, kind_b))?,
    };
    Ok(TensorDiff { name: name.to_owned(), a: kind_a.clone(), b: kind_b.clone(), identical, worst })
}

/// Bytes that are compared at a time, and elements.
const BLOCK: usize = 1 << 17;

fn same_bytes(name: &str, a: &Tensors, b: &Tensors) -> Result<bool> {
    let (mut a, mut b) = (a.read(name)?, b.read(name)?);
    let [mut block_a, mut block_b] = [Vec::new(), Vec::new()];
    loop {
        a.next_block(BLOCK, &mut block_a)?;
        b.next_block(BLOCK, &mut block_b)?;
        if block_a != block_b {
            return Ok(false);
        }
        if block_a.is_empty() {
            return Ok(true);
        }
    }
}

/// The largest difference between tensors of one shape; none if they have no element, or elements that are no numbers.
fn worst(
    name: &str,
    (a, kind_a): (&Tensors, &TensorKind),
    (b, kind_b): (&Tensors, &TensorKind),
) -> Result<Option<Worst>> {
    let (mut read_a, mut read_b) = (a.read(name)?, b.read(name)?);
    let (mut bytes, mut block_a, mut block_b) = (Vec::new(), Vec::new(), Vec::new());
    let (mut first, mut largest, mut worst) = (0, 0.0f64, None::<(f64, usize, [f64; 2])>);
    loop {
        read_a.next_block(BLOCK / 8 * kind_a.dtype.bitsize(), &mut bytes)?;
        if !element::decode(kind_a.dtype, &bytes, &mut block_a) {
            return Ok(None);
        }
        read_b.next_block(BLOCK / 8 * kind_b.dtype.bitsize(), &mut bytes)?;
        if !element::decode(kind_b.dtype, &bytes, &mut block_b) {
            return Ok(None);
        }
        if block_a.is_empty() {
            break;
        }
        for (at, (&a, &b)) in block_a.iter().zip(&block_b).enumerate() {
            let difference = difference(a, b);
            if worst.is_none_or(|(largest, ..)| difference > largest) {
                worst = Some((difference, first + at, [a, b]));
            }
            if b.is_finite() {
                largest = largest.max(b.abs());
            }
        }
        first += block_a.len();
    }
    Ok(worst.map(|(max_abs, at, values)| {
        let relative = if max_abs == 0.0 { 0.0 } else { max_abs / largest };
        Worst { max_abs, relative, at: index(at, &kind_a.shape), values }
    }))
}

fn difference(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => 0.0,
        (false, false) if a == b => 0.0,
        (false, false) => (a - b).abs(),
        _ => f64::INFINITY,
    }
}

/// The index of element `at` of a tensor, row by row.
fn index(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let i = at % size;
            at /= size;
            i
        })
        .collect();
    index.reverse();
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_count_row_by_row() {
        assert_eq!(index(0, &[]), [0; 0]);
        assert_eq!(index(7, &[9]), [7]);
        assert_eq!(index(3 * 20 + 2 * 4 + 1, &[6, 5, 4]), [3, 2, 1]);
    }

    #[test]
    fn what_is_no_number_differs_from_every_number() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert_eq!(difference(nan, nan), 0.0);
        assert_eq!(difference(nan, 0.0), inf);
        assert_eq!(difference(0.0, nan), inf);
        assert_eq!(difference(inf, inf), 0.0);
        assert_eq!(difference(inf, -inf), inf);
        assert_eq!(difference(1.5, -0.5), 2.0);
    }
}
