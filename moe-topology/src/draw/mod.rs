//! Pictures of a folding: [`text`] and [`table`] for the terminal, [`svg`] for documents, [`json`] for programs.

mod json;
mod svg;
mod text;

pub use json::json;
pub use svg::svg;
pub use text::{table, text};

use crate::{Axes, Folding, View};

/// `tp 2 · cp 4 (inner 2, outer 2) · dp 2 · pp 2`: digits where an axis has two.
fn sizes<V: View>(folding: &Folding) -> String {
    let axes = (0..4).map(|axis| {
        let (whole, [inner, outer]) = (Axes::<V>::axis(axis), digits::<V>(axis));
        let (size, inner, outer) = (folding.size(whole), folding.size(inner), folding.size(outer));
        match inner > 1 && outer > 1 {
            true => format!("{whole} {size} (inner {inner}, outer {outer})"),
            false => format!("{whole} {size}"),
        }
    });
    axes.collect::<Vec<_>>().join(" · ")
}

/// The inner and the outer digit of an axis.
fn digits<V: View>(axis: usize) -> [Axes<V>; 2] {
    [Axes::inner(axis), Axes::outer(axis)]
}
