//! Pictures of a folding: [`text`] and [`table`] for the terminal, [`svg`] for documents, [`json`] for programs.

mod json;
mod svg;
mod text;

pub use json::json;
pub use svg::svg;
pub use text::{table, text};

use crate::{Axes, Folding, View};

/// `tp 2 · cp 2 · dp 2 · pp 2`.
fn sizes<V: View>(folding: &Folding) -> String {
    let axes = Axes::<V>::ALL.iter().map(|axis| format!("{axis} {}", folding.size(axis)));
    axes.collect::<Vec<_>>().join(" · ")
}
