//! Pictures of a folding: [`text`] and [`table`] for the terminal, [`svg`] for documents, [`json`] for programs.

mod json;
mod svg;
mod text;

pub use json::json;
pub use svg::svg;
pub use text::{table, text};
